"""The server's key: a request without it gets a 401 before anything of it is read. Not responsible for several keys.

`/health` and `/metrics` stay open, so that probes and scrapers need no secret.
"""

import hmac

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from diptych.errors import Unauthorized
from diptych.serve.openai import error_body

OPEN = frozenset(("/health", "/metrics"))


class Guard:
    """Lets through what carries `Authorization: Bearer <key>`, and what is open to all."""

    def __init__(self, app: ASGIApp, key: str):
        self._app = app
        self._wanted = b"bearer " + key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN and not self._knows(scope["headers"]):
            error = Unauthorized("this server wants its key, as 'Authorization: Bearer <key>'")
            headers = {"www-authenticate": "Bearer"}
            await Response(error_body(error), error.status, headers, "application/json")(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _knows(self, headers: list[tuple[bytes, bytes]]) -> bool:
        given = next((value for name, value in headers if name == b"authorization"), b"")
        # The scheme's case does not matter, the key's does; the time this takes says nothing of how much was right.
        return hmac.compare_digest(given[:7].lower() + given[7:], self._wanted)
