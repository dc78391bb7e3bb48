"""The HTTP server under the application: uvicorn set up for token streams, and limits on who only holds a connection.

Whoever does not get to the end of a request's head, or sends too much of it, is hung up on. Bodies have their own
limits (`reading.py`). Not responsible for what is served (`api.py`).
"""

import asyncio
import contextlib
import logging
import resource
import socket
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 1 << 16  # of a request's line and headers
HEAD_S = 10  # seconds in which they must be there; what is overdue goes at the second look
FINISH_S = 1  # how long open requests may take when the server is to stop; what then ends them has a second more
SPARE_FDS = 64  # descriptors kept for everything that is not a client


class Door(HttpToolsProtocol):
    """One connection, as uvicorn has it, with a limit on what it may send before a request has begun."""

    num_head_bytes = 0
    in_head = True
    looked_at = False

    @property
    def waits(self) -> bool:
        """No request is being answered, and none was a moment ago: what comes, if anything does, is no whole head."""
        answered = self.cycle is None or self.cycle.response_complete
        return answered and self.timeout_keep_alive_task is None

    def data_received(self, data: bytes) -> None:
        """Take in bytes."""
        super().data_received(data)
        self.num_head_bytes = self.num_head_bytes + len(data) if self.in_head else 0
        if self.num_head_bytes > MAX_HEAD_BYTES:
            self.transport.close()

    def on_message_begin(self) -> None:
        """A request's first byte is here."""
        self.in_head = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Its head is: what follows is its body, whoever still wants it."""
        self.in_head = False
        super().on_headers_complete()


class Server(uvicorn.Server):
    """Stops when `should_exit` is set. Signals are for whoever runs it (`process.py`)."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the handlers as they are."""
        yield

    async def stop(self, serving: "asyncio.Future[None]", end_requests: Callable[[], None]) -> None:
        """Take nothing new; open requests may finish, and are then to be ended by `end_requests`. Not a word of it."""
        self.should_exit = True
        await asyncio.wait({serving}, timeout=FINISH_S)
        end_requests()
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # a client that does not read is cut off
        await serving


def make_server(app: ASGIApp, host: str = "127.0.0.1", port: int = 0, fd: int | None = None) -> Server:
    """A uvicorn server: uvloop, httptools, TCP_NODELAY (asyncio's default), and our own lines in the log."""

    async def sweep() -> None:
        hang_up_on_idlers(server.server_state.connections)

    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        fd=fd,
        loop="uvloop",
        http=Door,
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        log_level="error",  # what a client did wrong is not worth a line of ours
        server_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=FINISH_S + 1,
        backlog=2048,
        limit_concurrency=max_connections(),
        callback_notify=sweep,
        timeout_notify=HEAD_S,
    )
    server = Server(config)
    return server


def hang_up_on_idlers(connections: Any) -> None:
    """Close every connection that waited at the last look already, and has not begun a request since."""
    for door in list(connections):
        if door.looked_at and door.waits:
            door.transport.close()
        door.looked_at = door.waits


def max_connections() -> int:
    """How many connections the descriptors of this process allow; more get a 503. Takes as many as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    return max(soft - SPARE_FDS, 1)


def port_of(server: uvicorn.Server) -> int:
    """The port a started server listens on."""
    bound: socket.socket = server.servers[0].sockets[0]
    return int(bound.getsockname()[1])
