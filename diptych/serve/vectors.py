"""One HTTP request that wants vectors: submits its jobs, waits for all of them, replies once.

The sibling of `exchange.py` for jobs that write nothing. A request of many inputs is many jobs, so many of them at a
time that the cluster is busy and others still get in. Not responsible for what a reply says (`pooling.py`).
"""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from diptych.errors import DiptychError, Overloaded, Unavailable
from diptych.serve import openai
from diptych.serve.exchange import all_of, while_connected
from diptych.serve.frontend import Chunk, Frontend, Job, Label
from diptych.serve.metrics import Metrics, Timer

Vector = NDArray[np.float32]

WINDOW = 128  # jobs of one HTTP request that are submitted at a time


class Vectors:
    """The ASGI response to a checked request. `render` makes the body of its vectors, in the jobs' order.

    It starts nothing before it is called. The first job that fails ends the others, and its error is the reply.
    `ident`: the id of the reply, by which its jobs are found later. traced: the reply says where the time went.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        render: Callable[[list[Vector]], bytes],
        frontend: Frontend,
        metrics: Metrics,
        arrived: float,
        ident: str = "",
        traced: bool = False,
    ):
        self._ident = ident
        self._traced = traced
        self._jobs = jobs
        self._render = render
        self._frontend = frontend
        self._metrics = metrics
        self._arrived = arrived
        self._gate = asyncio.Semaphore(WINDOW)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def run() -> None:
            caller = scope.get("request_id", "")
            jobs = [replace(job, label=Label(self._ident, caller, i)) for i, job in enumerate(self._jobs)]
            vectors = await all_of([self._one(job) for job in jobs])
            body = self._render(vectors)
            if self._traced:
                body = body[:-1] + b',"diptych":' + msgspec.json.encode({"trace": await self._trace()}) + b"}"
            await Response(body, media_type="application/json")(scope, receive, send)

        await while_connected(receive, run())

    async def _trace(self) -> list[dict[str, Any]]:
        with contextlib.suppress(DiptychError):  # the reply is whole, whether or not the router still says how it went
            return await self._frontend.records(self._ident)
        return []

    async def _one(self, job: Job) -> Vector:
        async with self._gate:
            return await _Errand(job, Timer(self._metrics, self._arrived, len(job.tokens))).run(self._frontend)


class _Errand:
    """One job, from its submission to its vector. However it ends, the books are closed and the router knows."""

    __slots__ = ("_cached", "_how", "_job", "_timer")

    def __init__(self, job: Job, timer: Timer):
        self._job = job
        self._timer = timer
        self._how = "cancelled"
        self._cached = 0

    async def run(self, frontend: Frontend) -> Vector:
        try:
            return await self._ask(frontend)
        except DiptychError as error:
            self._how = "rejected" if isinstance(error, Overloaded | Unavailable) else "failed"
            raise
        finally:
            self._timer.end(self._how, self._cached)

    async def _ask(self, frontend: Frontend) -> Vector:
        request, stream = frontend.submit(self._job)
        chunk: Chunk | None = None
        try:
            chunk = await stream.get()
        finally:
            if chunk is None:
                frontend.cancel(request)
        if chunk.error is not None:
            raise openai.rejection(*chunk.error)
        if not chunk.vector:
            raise DiptychError("a worker computed the prompt and made no vector of it")
        self._timer.computed()
        self._how, self._cached = "computed", chunk.cached
        return np.frombuffer(chunk.vector, np.float32)
