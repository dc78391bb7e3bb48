"""Reading a request's body, within its limits of size and time. Not responsible for what is in it (`openai.py`)."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

from starlette.requests import Request

from diptych.errors import TooLarge, TooSlow

T = TypeVar("T")

# Encoding this many characters takes about 2 ms; more of it goes to a thread (tokenizers lets go of the GIL).
LONG_TEXT = 8192


async def read_body(request: Request, limit: int, timeout_s: float) -> bytes:
    """The whole body; TooLarge over `limit` bytes, TooSlow after `timeout_s` seconds."""
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
    """Long work in a thread, short work here, where a thread would cost more than it."""
    return await asyncio.to_thread(work) if size > LONG_TEXT else work()
