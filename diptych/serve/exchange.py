"""One HTTP request that generates: submits its jobs, streams or collects their answers, cancels what the client left.

An `Exchange` is the ASGI response that a route hands back; it starts nothing before it is called. An error before the
first byte is raised (and becomes a status); one after it becomes an event and ends the stream. Not responsible for
reading or checking the request (`api.py`, `openai.py`).
"""

import asyncio
import contextlib
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.types import Message, Receive, Scope, Send

from diptych.errors import DiptychError, Overloaded, Unavailable
from diptych.serve import openai
from diptych.serve.answer import Answer
from diptych.serve.frontend import Frontend, Job, Stream
from diptych.serve.metrics import Metrics, Timer
from diptych.serve.text import Text

_SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would otherwise collect tokens
]


@dataclass(frozen=True, slots=True)
class Order:
    """What a checked request comes down to. `jobs` are numbered by choice; `arrived` is on `perf_counter`."""

    chat: bool
    jobs: Sequence[Job]
    stops: tuple[str, ...]
    streamed: bool
    with_usage: bool
    with_timings: bool
    ident: str
    model: str
    created: int
    arrived: float


class Exchange:
    """Runs an order and sends its reply."""

    def __init__(self, order: Order, frontend: Frontend, text: Text, metrics: Metrics):
        self._order = order
        self._frontend = frontend
        self._text = text
        self._metrics = metrics
        self._head = openai.head(order.chat, order.streamed, order.ident, order.created, order.model)
        self._turns: list[_Turn] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await while_connected(receive, self._run(_Wire(send)))

    async def _run(self, wire: "_Wire") -> None:
        try:
            self._submit()
            await (self._stream(wire) if self._order.streamed else self._collect(wire))
        finally:
            for turn in self._turns:
                turn.leave(self._frontend)

    def _submit(self) -> None:
        order = self._order
        for job in order.jobs:
            timer = Timer(self._metrics, order.arrived, len(job.tokens))
            try:
                request, stream = self._frontend.submit(job)
            except BaseException:
                timer.end("rejected")
                raise
            self._turns.append(_Turn(request, stream, Answer(self._text, job, order.stops), timer))

    async def _collect(self, wire: "_Wire") -> None:
        texts = await all_of([self._whole(turn) for turn in self._turns])
        chat = self._order.chat
        choices = [
            openai.choice(chat, index, text, turn.answer.finish or "")
            for index, (turn, text) in enumerate(zip(self._turns, texts, strict=True))
        ]
        await wire.reply(openai.reply(self._head, choices, self._usage(), self._timings()))

    async def _whole(self, turn: "_Turn") -> str:
        parts = []
        while turn.answer.finish is None:
            parts.append(await turn.more())
        return "".join(parts)

    async def _stream(self, wire: "_Wire") -> None:
        order = self._order
        frames = [openai.Frames(order.chat, self._head, i, order.with_usage) for i in range(len(self._turns))]
        try:
            await all_of([self._pump(turn, frames[i], wire) for i, turn in enumerate(self._turns)])
        except DiptychError as error:
            if not wire.started:
                raise
            await wire.end(openai.error_frame(error))
            return
        used = openai.usage_frame(self._head, self._usage()) if order.with_usage else b""
        await wire.end(used + openai.DONE)

    async def _pump(self, turn: "_Turn", frames: openai.Frames, wire: "_Wire") -> None:
        answer = turn.answer
        before = frames.first()
        while answer.finish is None:
            text = await turn.more()
            data = frames.text(text) if text else b""
            if answer.finish is not None:
                data += frames.last(answer.finish, answer.record if self._order.with_timings else None)
            if before or data:
                await wire.write(before + data)
                before = b""

    def _usage(self) -> dict[str, Any]:
        written = sum(turn.answer.num_tokens for turn in self._turns)
        cached = sum(turn.answer.cached for turn in self._turns)
        return openai.usage(sum(len(job.tokens) for job in self._order.jobs), written, cached)

    def _timings(self) -> Any:
        if not self._order.with_timings:
            return None
        records = [turn.answer.record for turn in self._turns]
        return records[0] if len(records) == 1 else records


@dataclass(slots=True)
class _Turn:
    """One job on its way."""

    request: int
    stream: Stream
    answer: Answer
    timer: Timer
    failure: str = "cancelled"

    async def more(self) -> str:
        """The text of the next chunk."""
        chunk = await self.stream.get()
        before = self.answer.num_tokens
        try:
            text = self.answer.feed(chunk)
        except DiptychError as error:
            turned_away = isinstance(error, Overloaded | Unavailable) and before == 0
            self.failure = "rejected" if turned_away else "failed"
            raise
        self.timer.tokens(self.answer.num_tokens - before)
        return text

    def leave(self, frontend: Frontend) -> None:
        """However it went, the router need not go on with this, and the books are closed."""
        self.timer.end(self.answer.finish or self.failure, self.answer.cached)
        if not self.answer.ended:
            frontend.cancel(self.request)


class _Wire:
    """The way to the client. The status line goes out with the first byte, so that an early error has its own."""

    __slots__ = ("_send", "started")

    def __init__(self, send: Send):
        self._send = send
        self.started = False

    async def write(self, data: bytes) -> None:
        if not self.started:
            self.started = True
            await self._send(_start(_SSE_HEADERS))
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self, data: bytes) -> None:
        await self.write(data)
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def reply(self, body: bytes) -> None:
        length = str(len(body)).encode()
        await self._send(_start([(b"content-type", b"application/json"), (b"content-length", length)]))
        await self._send({"type": "http.response.body", "body": body, "more_body": False})


def _start(headers: list[tuple[bytes, bytes]]) -> Message:
    return {"type": "http.response.start", "status": 200, "headers": list(headers)}


async def while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Run `work`, and cancel it as soon as the client is gone. Its errors are raised."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
        task.cancel()  # does nothing where it is done
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def all_of(works: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
    """Run all; the first error cancels the others and is raised as it is."""
    if len(works) == 1:
        return [await works[0]]
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
