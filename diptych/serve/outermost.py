"""What surrounds every request: its id, the last resort against our own errors, and its line in the log at the end.

A line says what was asked of whom and how it went; it never has any of the text. Not responsible for errors that have
a status (`api.py`), nor for what is counted (`metrics.py`).
"""

import logging
import uuid
from collections.abc import Awaitable
from dataclasses import asdict, dataclass
from time import perf_counter

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from diptych.errors import DiptychError, TooLarge
from diptych.serve import openai
from diptych.serve.logs import about

log = logging.getLogger(__name__)

MAX_HEADERS = 128
MAX_HEADER_BYTES = 1 << 15
QUIET = frozenset(("/health", "/metrics", "/workers"))  # probes and scrapers: lines by the second, and none of interest


@dataclass(slots=True)
class Record:
    """What a generation leaves for the log; an endpoint finds it in the scope. `reply`: the id of its body."""

    reply: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    ttft_s: float | None = None
    finish: str = ""


class Outermost:
    """Gives every reply the request's `X-Request-Id`, and turns an error of ours into a 500 with an envelope."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        began = perf_counter()
        ident = _request_id(scope["headers"])
        scope["request_id"] = ident.decode("latin-1")
        scope["send_more"] = send  # for what follows a reply's start, at which alone we and the layers below us look
        status = 0

        def send_named(message: Message) -> Awaitable[None]:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", ident)]
            return send(message)

        try:
            if _too_many(scope["headers"]):
                error = TooLarge(f"more than {MAX_HEADERS} headers, or more than {MAX_HEADER_BYTES} bytes of them")
                await _reply(openai.error_body(error), 431)(scope, receive, send_named)
                return
            await self.app(scope, receive, send_named)
        except Exception:
            log.exception("a request failed", extra=about(scope["request_id"]))
            if status:
                raise  # uvicorn closes the connection: the client sees that the reply is not whole
            body = openai.envelope("internal error; the log has more", DiptychError.kind)
            await _reply(body, 500)(scope, receive, send_named)
        finally:
            if scope["path"] not in QUIET:
                # No status: the client was gone before there was one.
                _log_line(scope, ident, status or 499, perf_counter() - began)


def _reply(body: bytes, status: int) -> Response:
    return Response(body, status, media_type="application/json")


def _log_line(scope: Scope, ident: bytes, status: int, seconds: float) -> None:
    if not log.isEnabledFor(logging.INFO):
        return
    said = {"request": ident.decode("latin-1"), "method": scope["method"], "route": _route(scope), "status": status}
    record: Record | None = scope.get("record")
    found = {} if record is None else {key: value for key, value in asdict(record).items() if value is not None}
    if "ttft_s" in found:
        found["ttft_s"] = round(found["ttft_s"], 4)
    log.info("request", extra={"fields": said | found | {"seconds": round(seconds, 4)}})


def _route(scope: Scope) -> str:
    """The path, as the application has it: "/requests/{id}". "-" where it is not one of ours: anything can be in it."""
    endpoint = scope.get("endpoint")
    if endpoint is None or not scope.get("path_params"):
        return "-" if endpoint is None else str(scope["path"])
    paths = (route.path for route in scope["app"].routes if getattr(route, "endpoint", None) == endpoint)
    return next(paths, "-").replace(":path}", "}")


def _too_many(headers: list[tuple[bytes, bytes]]) -> bool:
    return len(headers) > MAX_HEADERS or sum(len(name) + len(value) for name, value in headers) > MAX_HEADER_BYTES


def _request_id(headers: list[tuple[bytes, bytes]]) -> bytes:
    given = next((value for name, value in headers if name == b"x-request-id"), b"")
    # Only what is safe in a header and a log line is taken over.
    if 0 < len(given) <= 128 and all(33 <= char <= 126 for char in given):
        return given
    return uuid.uuid4().hex.encode()
