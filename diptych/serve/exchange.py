"""One HTTP request that generates: submits its jobs, streams or collects their answers, cancels what the client left.

An `Exchange` is the ASGI response that a route hands back; it starts nothing before it is called. An error before the
first byte is raised (and becomes a status); one after it becomes an event and ends the stream. Not responsible for
reading or checking the request (`api.py`, `openai.py`), nor for one answer's state (`answer.py`, `turn.py`).
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.types import Message, Receive, Scope, Send

from diptych.errors import DiptychError
from diptych.serve import openai, replies
from diptych.serve.answer import Answer
from diptych.serve.calls import CallParser, Format
from diptych.serve.frontend import Frontend, Job
from diptych.serve.metrics import Metrics, Timer
from diptych.serve.outermost import Record
from diptych.serve.text import Text
from diptych.serve.turn import Showing, Turn

_SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would otherwise collect tokens
]


@dataclass(frozen=True, slots=True)
class Order:
    """What a checked request comes down to. `jobs` are numbered by choice; `arrived` is on `perf_counter`.

    The jobs of one prompt follow each other, `num_each` of them. `echoes`: the texts of the prompts, where the answers
    are to begin with them; `silent`: they are all that is wanted. `num_best`: so many of each prompt's answers are
    shown, those of the highest mean log-probability. `calls`: how calls are written, where they are to be found.
    `traced`: the reply says where the time went. `with_stop`: what ends a text is part of it.
    """

    chat: bool
    jobs: Sequence[Job]
    stops: tuple[str, ...]
    streamed: bool
    with_usage: bool
    ident: str
    model: str
    created: int
    arrived: float
    num_each: int = 1
    echoes: tuple[str, ...] = ()
    silent: bool = False
    with_usage_always: bool = False
    with_token_ids: bool = False
    with_logprobs: bool = False
    num_best: int | None = None
    calls: Format | None = None
    traced: bool = False
    with_stop: bool = False


class Exchange:
    """Runs an order and sends its reply."""

    def __init__(self, order: Order, frontend: Frontend, text: Text, metrics: Metrics):
        self._order = order
        self._head = replies.head(order.chat, order.streamed, order.ident, order.created, order.model)
        self._frontend = frontend
        self._metrics = metrics
        self._turns: list[Turn] = []
        for number, job in enumerate(order.jobs):
            form = order.calls
            answer = Answer(text, job, order.stops, order.silent, form.markers if form else (), order.with_stop)
            timer = Timer(metrics, order.arrived, len(job.tokens))
            leader = self._turns[number - number % order.num_each] if number % order.num_each else None
            showing = Showing(text, order.chat, job, order.with_token_ids, order.with_logprobs)
            self._turns.append(Turn(job, answer, timer, leader, showing, CallParser(form) if form else None))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._run(_Wire(send, scope.get("send_more", send))))
        finally:
            scope["record"] = self._record()
            if all(turn.answer.finish for turn in self._turns):
                self._metrics.longest_answers.observe(max(turn.answer.num_tokens for turn in self._turns))

    async def _run(self, wire: "_Wire") -> None:
        try:
            for turn in self._turns:
                if not turn.waits:
                    turn.submit(self._frontend)
            await (self._stream(wire) if self._order.streamed else self._collect(wire))
        finally:
            for turn in self._turns:
                turn.leave(self._frontend)

    async def _collect(self, wire: "_Wire") -> None:
        texts = await all_of([self._whole(turn) for turn in self._turns])
        choices = []
        for index, number in enumerate(self._best()):
            turn, text = self._turns[number], self._echo(number) + texts[number]
            said = replies.message(turn.pieces(text)) if self._order.chat else {"text": text}
            choices.append(replies.choice(said, index, turn.finish, turn.whole(), turn.answer.stop_reason))
        ids = self._order.jobs[0].tokens if self._order.chat and self._order.with_token_ids else None
        trace = await self._trace()
        await wire.reply(replies.reply(self._head, choices, self._usage(), prompt_token_ids=ids, diptych=trace))

    async def _trace(self) -> dict[str, Any] | None:
        """The records of these jobs, where they are asked for."""
        if not self._order.traced:
            return None
        for turn in self._turns:
            turn.note(self._frontend)
        found: list[dict[str, Any]] = []
        with contextlib.suppress(DiptychError):  # the answer is whole, whether or not the router still says how it went
            found = await self._frontend.records(self._order.ident)
        return {"trace": found}

    def _best(self) -> list[int]:
        """The answers to show, by number: all, or the most likely of each prompt's."""
        numbers, each, best = range(len(self._turns)), self._order.num_each, self._order.num_best
        if best is None:
            return list(numbers)
        groups = [numbers[i : i + each] for i in range(0, len(numbers), each)]
        return [n for group in groups for n in sorted(group, key=lambda n: -self._turns[n].mean_logprob())[:best]]

    async def _whole(self, turn: Turn) -> str:
        await turn.begin(self._frontend)
        parts = []
        while turn.answer.finish is None:
            parts.append(turn.take(await turn.more()))
            turn.keep()
        return "".join(parts)

    async def _stream(self, wire: "_Wire") -> None:
        order = self._order
        with_usage = order.with_usage or order.with_usage_always
        frames = [replies.Frames(order.chat, self._head, i, with_usage) for i in range(len(self._turns))]
        try:
            await all_of([self._pump(i, frames[i], wire) for i in range(len(self._turns))])
        except DiptychError as error:
            if not wire.started:
                raise
            await wire.end(openai.error_frame(error))
            return
        trace = await self._trace()
        last = b""
        if order.with_usage or trace:
            last = replies.last_frame(self._head, self._usage() if order.with_usage else None, trace)
        await wire.end(last + replies.DONE)

    async def _pump(self, number: int, frames: replies.Frames, wire: "_Wire") -> None:
        turn, answer = self._turns[number], self._turns[number].answer
        await turn.begin(self._frontend)
        always = self._order.with_usage_always
        first = True
        while answer.finish is None:
            text = turn.take(await turn.more())
            used = turn.usage() if always else None
            data = b""
            if first:
                data = self._beginning(number, frames, used)
                first = False
            if turn.parser is not None:
                data += frames.pieces(turn.pieces(text), turn.showing.step(answer, used))
            elif text or answer.taken:
                data += frames.text(text, turn.showing.step(answer, used))
            if answer.finish is not None:
                data += frames.last(turn.finish, replies.Detail(usage=used), answer.stop_reason)
            if data:
                await wire.write(data)

    def _beginning(self, number: int, frames: replies.Frames, used: dict[str, Any] | None) -> bytes:
        """The event before the first token: chat says who speaks; an echo needs what the first chunk says of it."""
        turn = self._turns[number]
        if self._order.echoes:
            return frames.text(self._echo(number), turn.showing.prompt(turn.answer, used))
        detail = turn.showing.prompt(turn.answer, used)
        if self._order.chat:
            return frames.first(detail)
        return frames.text("", detail) if detail.prompt_ids is not None else b""

    def _echo(self, number: int) -> str:
        return self._order.echoes[number // self._order.num_each] if self._order.echoes else ""

    def _record(self) -> Record:
        """What the log says of it; `cancelled` is a client that left."""
        used = self._usage()
        ends = sorted({turn.ending for turn in self._turns})
        cached = used["prompt_tokens_details"]["cached_tokens"]
        ttft_s = self._turns[0].ttft_s
        return Record(
            self._order.ident, used["prompt_tokens"], cached, used["completion_tokens"], ttft_s, ",".join(ends)
        )

    def _usage(self) -> dict[str, Any]:
        written = sum(turn.answer.num_tokens for turn in self._turns)
        leaders = self._turns[:: self._order.num_each]  # several answers to one prompt: it counts once
        cached = sum(turn.answer.cached for turn in leaders)
        return replies.usage(sum(len(turn.job.tokens) for turn in leaders), written, cached)


class _Wire:
    """The way to the client. The status line goes out with the first byte, so that an early error has its own."""

    __slots__ = ("_send", "_send_more", "started")

    def __init__(self, send: Send, send_more: Send):
        self._send = send
        self._send_more = send_more  # of the same reply, without the layers that want to see its start
        self.started = False

    def write(self, data: bytes) -> Awaitable[None]:  # no coroutine of its own: it is called for each token
        if not self.started:
            return self._begin(data)
        return self._send_more({"type": "http.response.body", "body": data, "more_body": True})

    async def _begin(self, data: bytes) -> None:
        self.started = True
        await self._send(_start(_SSE_HEADERS))
        await self.write(data)

    async def end(self, data: bytes) -> None:
        await self.write(data)
        await self._send_more({"type": "http.response.body", "body": b"", "more_body": False})

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
