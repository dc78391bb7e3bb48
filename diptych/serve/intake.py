"""Takes in what a client sent: bodies within limits of size and time, and long texts without holding up everyone else.

Not responsible for what a body says (`openai.py`, `pooling.py`), nor for tokens (`text.py`).
"""

import asyncio
from collections.abc import Callable, Collection
from typing import TypeVar

from starlette.requests import Request

from diptych.errors import Forbidden, TooLarge, TooSlow, UnsupportedType
from diptych.serve.frontend import ModelCard
from diptych.serve.openai import too_long
from diptych.serve.text import Text

T = TypeVar("T")

# Encoding this many characters takes about 2 ms; more of it goes to a thread (tokenizers lets go of the GIL).
_LONG_TEXT = 8192


TRACE = "x-diptych-trace"


def wants_trace(request: Request) -> bool:
    """Whether a reply is to say where its time went."""
    return request.headers.get(TRACE, "0").lower() not in ("", "0", "false")


def check_origin(request: Request, allowed: Collection[str]) -> None:
    """Refuse what a web page of another origin asks; browsers say whose it is, and other clients say nothing."""
    origin = request.headers.get("origin")
    if origin is None or origin in allowed or "*" in allowed:
        return
    if origin.partition("://")[2] != request.headers.get("host"):
        raise Forbidden("pages of other origins may not ask for this; see --cors-origin")


async def read_body(request: Request, limit: int, timeout_s: float) -> bytes:
    """The whole body; TooLarge over `limit` bytes, TooSlow after `timeout_s` seconds.

    UnsupportedType where it is said to be anything but JSON: what a web page can send to anywhere without asking first.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind and kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise UnsupportedType(
            f"a body of the type '{kind[:64]}' is not read; send it as 'content-type: application/json'"
        )
    if int(request.headers.get("content-length", "0")) > limit:
        raise TooLarge(f"the request body is over {limit} bytes")
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for part in request.stream():
                body += part
                if len(body) > limit:
                    raise TooLarge(f"the request body is over {limit} bytes")
    except TimeoutError as error:
        raise TooSlow(f"the request body did not come within {timeout_s:g} s") from error
    return bytes(body)


async def aside(size: int, work: Callable[[], T]) -> T:
    """Long work on text in a thread, short work here: a thread costs more than it."""
    return await asyncio.to_thread(work) if size > _LONG_TEXT else work()


def check_size(num_chars: int, text: Text, card: ModelCard, param: str) -> None:
    """Refuse what cannot fit before tokenizing it: 32 MiB of text would be ten seconds of a core."""
    if num_chars > card.max_tokens * max(64, text.longest_token):
        raise too_long(f"the prompt has {num_chars} characters", card, param)
