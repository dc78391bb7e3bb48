"""An API process: the HTTP server, and a `Frontend` over a socket to the router. No torch.

Not responsible for HTTP (`api.py`) or for placing requests (the router).
"""

import asyncio
import contextlib
import gc
import itertools
import logging
import socket
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec

from diptych.errors import Conflict, NotFound, ProtocolError, Unavailable
from diptych.modelfacts import locate
from diptych.policy.messages import Cancelled, Reason
from diptych.serve import process
from diptych.serve.api import Settings, make_app
from diptych.serve.build import cluster_card
from diptych.serve.channel import Channel, call
from diptych.serve.frontend import Chunk, Job
from diptych.serve.logs import about
from diptych.serve.server import make_server
from diptych.serve.text import Text
from diptych.serve.wire import (
    Ask,
    Deliver,
    Hello,
    Look,
    Note,
    Report,
    Retire,
    Submit,
    Ticket,
    pack,
    pack_ids,
    unpack_emit,
)

log = logging.getLogger(__name__)

REPORT_S = 3.0  # longer than the router gives its workers


class Inbox:
    """The chunks of one request that were not taken yet: a queue for one taker, cheaper than asyncio's."""

    __slots__ = ("_chunks", "_loop", "_waiter", "name")

    def __init__(self, name: str) -> None:
        self.name = name  # what log lines call the request
        self._chunks: deque[Chunk] = deque()
        self._loop = asyncio.get_running_loop()  # once: asking costs a system call
        self._waiter: asyncio.Future[None] | None = None

    def put(self, chunk: Chunk) -> None:
        """Add one; never waits."""
        self._chunks.append(chunk)
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def get(self) -> Chunk:
        """Wait for the next one."""
        while not self._chunks:
            self._waiter = self._loop.create_future()
            await self._waiter
        return self._chunks.popleft()


class RouterFrontend:
    """Implements `Frontend` over a channel to the router."""

    def __init__(self) -> None:
        self.lost = asyncio.Event()  # the router is gone for good
        self._drain_timeout_s = 0.0
        self._ended = ""  # why no job is taken any more
        self._channel: Channel | None = None
        self._streams: dict[int, Inbox] = {}
        self._reports: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._numbers = itertools.count(1)

    async def connect(self, orders: process.Orders) -> None:
        """Call the router; it may still be starting."""
        self._drain_timeout_s = orders.cluster.drain_timeout_s
        hello = Hello("api", orders.name, orders.incarnation)
        self._channel = await call(orders.router, orders.key, hello, self._meet)

    def close(self) -> None:
        """Hang up; what is open is cancelled by the router."""
        if self._channel is not None:
            self._channel.close()

    def submit(self, job: Job) -> tuple[int, Inbox]:
        """Send a job off."""
        if self._ended:
            raise Unavailable(self._ended)
        channel = self._connected()
        request = next(self._numbers)
        stream = self._streams[request] = Inbox(job.label.name)
        ticket = Ticket(pack_ids(job.tokens), len(job.tokens), job.sampling, job.root)
        label = job.label
        names = (label.ident, label.caller, label.index)
        channel.say(Submit(request, len(job.tokens), job.max_new, job.priority, job.hashes, *names), pack(ticket))
        return request, stream

    def cancel(self, request: int) -> None:
        """Stop a request."""
        if self._streams.pop(request, None) is not None and self._channel is not None:
            self._channel.say(Cancelled(request))

    def note(self, note: Note) -> None:
        """Say how a client saw its answer."""
        if self._channel is not None:
            self._channel.say(note)

    async def records(self, name: str = "", limit: int = 1) -> list[dict[str, Any]]:
        """What the router knows of some requests."""
        found: list[dict[str, Any]] = (await self._ask(lambda number: Look(number, name, limit)))["records"]
        return found

    async def metrics(self) -> tuple[list[dict[str, Any]], str]:
        """One row a worker, and the router's own metrics."""
        report = await self._ask(lambda number: Ask(number, metrics=True))
        return report["workers"], report["metrics"]

    async def workers(self) -> list[dict[str, Any]]:
        """One row a worker."""
        rows: list[dict[str, Any]] = (await self._report())["workers"]
        return rows

    async def drain(self, worker: str, timeout_s: float | None, force: bool) -> dict[str, Any]:
        """Ask the router to take a worker out of service."""
        timeout_s = self._drain_timeout_s if timeout_s is None else timeout_s
        answer = await self._ask(lambda number: Retire(number, worker, timeout_s, force))
        status, why = answer.pop("status"), answer.pop("why", "")
        if status == 404:
            raise NotFound(why, "worker")
        if status == 409:
            raise Conflict(why)
        return answer

    async def health(self) -> tuple[bool, dict[str, Any]]:
        """True where requests can be served and are."""
        report = await self._report()
        rows = report.pop("workers")
        report["workers"] = {row["id"]: row["state"] for row in rows}
        return bool(report.pop("healthy")), report

    def _connected(self) -> Channel:
        if self._channel is None:
            raise Unavailable("the router is gone; try again later")
        return self._channel

    async def _report(self) -> dict[str, Any]:
        return await self._ask(Ask)

    async def _ask(self, question: Callable[[int], Ask | Look | Retire]) -> dict[str, Any]:
        """Ask the router something, under a number; its Report's attachment."""
        channel = self._connected()
        number = next(self._numbers)
        answer = self._reports[number] = asyncio.get_running_loop().create_future()
        channel.say(question(number))
        try:
            return await asyncio.wait_for(answer, REPORT_S)
        except TimeoutError:
            raise Unavailable("the router does not answer") from None
        finally:
            self._reports.pop(number, None)

    def _meet(self, channel: Channel) -> None:
        channel.heard = self._heard
        channel.lost = self._lost

    def _heard(self, message: Any, attachment: bytes) -> None:
        match message:
            case Deliver():
                self._deliver(message, attachment)
            case Report(number=number):
                answer = self._reports.get(number)
                if answer is not None and not answer.done():
                    answer.set_result(msgspec.json.decode(attachment, type=dict[str, Any]))
            case _:
                raise ProtocolError(f"a router does not say {type(message).__name__}")

    def _deliver(self, message: Deliver, attachment: bytes) -> None:
        over = bool(message.reason or message.status)
        stream = self._streams.pop(message.request, None) if over else self._streams.get(message.request)
        if stream is not None:
            reason = Reason(message.reason) if message.reason else None
            error = (message.status, message.why) if message.status else None
            try:
                tokens, extra = unpack_emit(message.count, attachment)
            except ProtocolError as why:  # the router passes on what workers say beside their tokens: one answer's end
                log.error("an answer cannot be read: %s", why, extra=about(stream.name))
                stream.put(Chunk([], None, (500, "a worker said something that is not in the protocol")))
                self.cancel(message.request)
                return
            stream.put(Chunk(tokens, reason, error, extra.cached, extra.scores, extra.prompt, extra.vector))

    def _lost(self, why: str) -> None:
        """The router is gone: every stream ends with an error, none is left waiting."""
        log.error("the router is gone: %s", why)
        self._channel = None
        self.end("the router is gone; try again later")
        self.lost.set()

    def end(self, why: str) -> None:
        """Every stream ends with an error, and no other begins."""
        self._ended = why
        for stream in self._streams.values():
            stream.put(Chunk([], None, (503, why)))
        self._streams.clear()


async def serve(orders: process.Orders) -> None:
    """Serve HTTP until told to stop; then open requests may finish for a moment."""
    cluster = orders.cluster
    frontend = RouterFrontend()
    settings = Settings(api_key=cluster.api_key, tool_parser=cluster.tool_parser, cors_origins=cluster.cors_origins)
    app = make_app(frontend, Text.load(locate(cluster.folder)), cluster_card(cluster), settings)
    await frontend.connect(orders)
    server = make_server(app, cluster.host, cluster.port)
    gc.collect()
    gc.freeze()  # what is loaded stays: no collection should walk it again
    listening = None if orders.fd is None else [socket.socket(fileno=orders.fd)]
    serving = asyncio.ensure_future(server.serve(listening))
    lost = asyncio.ensure_future(frontend.lost.wait())
    living = asyncio.ensure_future(process.show_life(orders))
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.wait({serving, lost}, return_when=asyncio.FIRST_COMPLETED)
    lost.cancel()
    living.cancel()
    # Without a router there is nothing to serve either: the supervisor is to notice.
    await server.stop(serving, lambda: frontend.end("the server is stopping"))


def main() -> None:
    """The process's entry."""
    process.run(serve, fragile=False)  # one request's failure is not the others'


if __name__ == "__main__":
    main()
