"""A whole cluster in one process and one thread: the same policy and drivers, with a queue instead of sockets.

For offline use (`diptych.LLM`) and for tests: nothing is timed, nothing waits, every message comes in order. Steps
run one after the other, so pairs give no speed here; they give the same tokens. Not responsible for processes.
"""

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diptych.engine.executor import Sampling, Score
from diptych.errors import BadRequest, DiptychError, TransferError
from diptych.journal import Journal
from diptych.policy.books import RouterSpec
from diptych.policy.membership import Drain, Drained, LinkMeasured
from diptych.policy.messages import (
    Cancel,
    Emit,
    Finish,
    Place,
    Pull,
    Read,
    ReadFailed,
    Reason,
    Run,
    Settled,
    Submitted,
    Tick,
    WorkerUp,
)
from diptych.policy.router import Router
from diptych.serve.account import Account
from diptych.serve.build import Parts
from diptych.serve.clock import Clock
from diptych.serve.router import RouterDriver
from diptych.serve.text import prompt_hashes
from diptych.serve.wire import Deliver, Ticket, pack_ids, unpack_emit
from diptych.serve.worker import WorkerDriver
from diptych.serve.worker_ports import ToPeer
from diptych.transfer.copying import checksum, read_now
from diptych.transfer.pool import Pool
from diptych.transfer.seam import Plan, Readable, Stats


@dataclass(slots=True)
class Answer:
    """What became of a request so far."""

    tokens: list[int] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)  # one for each token, where asked for
    prompt_scores: list[Score] = field(default_factory=list)  # from the second token of the prompt on
    cached: int = 0  # prompt tokens whose KV was found
    vector: bytes = b""  # where nothing was to be written: what came of the prompt, float32
    reason: Reason | None = None
    error: DiptychError | None = None

    @property
    def over(self) -> bool:
        """Nothing more will come."""
        return self.reason is not None or self.error is not None


class _WorkerPorts:
    """A worker's ports onto the queue. Sending, reading and computing all happen when their turn comes."""

    def __init__(self, cluster: "LocalCluster", parts: Parts):
        self._cluster = cluster
        self._parts = parts
        self._cancelled: set[int] = set()
        executor = parts.executor
        self.admit, self.extend, self.forget = executor.admit, executor.extend, executor.forget

    @property
    def _driver(self) -> WorkerDriver:
        return self._cluster.workers[self._parts.policy.spec.name]

    def run(self, step: Run) -> None:
        handle = self._parts.executor.launch(step)
        self._cluster.later(lambda: self._driver.ran(step.step, self._parts.executor.collect(handle)))

    def tell(self, peer: str, message: ToPeer, attachment: bytes) -> None:
        self._cluster.later(lambda: self._cluster.workers[peer].told(message.peer, message, attachment))

    def report(self, message: Emit | Finish | Drained | LinkMeasured | Account, attachment: bytes) -> None:
        name, router = self._parts.policy.spec.name, self._cluster.router
        match message:
            case Drained() | LinkMeasured():
                self._cluster.later(lambda: router.told(message))
            case Emit() | Finish():
                self._cluster.later(lambda: router.heard(name, message, attachment))
            case _:
                self._cluster.later(lambda: router.records.accounted(name, message))

    def lane(self, peer: str) -> str:
        return "local"

    def checksum(self, blocks: NDArray[np.int32]) -> NDArray[np.uint64]:
        return checksum(self._parts.pool, blocks)

    def pull(self, order: Pull, plan: Plan) -> None:
        self._cluster.later(lambda: self._read(order, plan))

    def cancel_pull(self, pull: int) -> None:
        self._cancelled.add(pull)

    def _read(self, order: Pull, plan: Plan) -> None:
        if order.pull in self._cancelled:
            self._driver.on(Settled(order.pull))
            return
        try:
            readable = self._cluster.workers[order.peer].permits.readable
            source = self._cluster.parts[order.peer].pool
            stats = self._cluster.read(source, self._parts.pool, plan, readable)
        except TransferError as error:
            self._driver.on(ReadFailed(order.pull, str(error)))
            self._driver.on(Settled(order.pull))
            return
        self._driver.on(Read(order.pull, stats.num_bytes, stats.elapsed_s))


class LocalCluster:
    """Router and workers around one queue. `step()` does the next thing; `run_until` as many as it takes.

    read: how a plan is carried out between two pools, the first of which may ask what a permit is good for; raises
    TransferError.
    """

    def __init__(
        self,
        parts: Iterable[Parts],
        router: RouterSpec | None = None,
        journal: Path | None = None,
        read: Callable[[Pool, Pool, Plan, Readable], Stats] = read_now,
    ):
        self.clock: Callable[[], float] = Clock()
        self.read = read
        self.parts = {p.policy.spec.name: p for p in parts}
        self.card = next(iter(self.parts.values())).card
        self._queue: deque[Callable[[], None]] = deque()
        self._numbers = itertools.count(1)
        self._answers: dict[int, Answer] = {}
        spec = router or RouterSpec()
        self._journals: list[Journal] = []
        vocab = self.card.vocab_size
        self.router = RouterDriver(Router(spec), self, self.clock, self._record(journal, "router", spec), vocab)
        self.workers = {
            name: WorkerDriver(
                p.policy, _WorkerPorts(self, p), self.clock, self._record(journal, name, p.policy.spec), vocab
            )
            for name, p in self.parts.items()
        }
        for p in self.parts.values():
            spec_ = p.policy.spec
            self.router.worker_up(
                WorkerUp(spec_.name, 0, spec_.role, spec_.num_blocks, spec_.block_size, p.pool.layout.token_bytes)
            )

    def submit(
        self, tokens: list[int], max_new: int, sampling: Sampling, priority: int = 0, find: bool = True
    ) -> Answer:
        """Hand a prompt in; the answer fills while `step` is called. Without `find` no cached prefix is used."""
        if not tokens:
            raise BadRequest("the prompt is empty", "prompt")
        root, hashes = prompt_hashes(tokens, self.card)
        hashes = hashes if find else ()
        number = next(self._numbers)
        answer = self._answers[number] = Answer()
        event = Submitted(number, len(tokens), max_new, hashes, priority)
        self.router.submit(number, event, Ticket(pack_ids(tokens), len(tokens), sampling, root))
        return answer

    def cancel(self, answer: Answer) -> None:
        """Stop a request."""
        for number, known in list(self._answers.items()):
            if known is answer:
                answer.reason = Reason.CANCELLED
                del self._answers[number]
                self.router.cancel(number)

    def drain(self, worker: str) -> None:
        """Give a worker nothing more; it leaves the books when it has done all it has."""
        self.router.told(Drain(worker, math.inf))

    def step(self) -> bool:
        """Do the next thing in the queue; False when there is nothing to do."""
        if not self._queue:
            self._tick()
        if not self._queue:
            return False
        self._queue.popleft()()
        return True

    def run_until(self, answers: Iterable[Answer]) -> None:
        """Go on until these are over; RuntimeError if the cluster stops before (that would be a deadlock)."""
        for answer in answers:
            while not answer.over:
                if not self.step():
                    raise RuntimeError("the cluster has nothing to do, and an answer is not over")

    def settle(self) -> None:
        """Go on until nothing is left to do."""
        while self._queue:
            self.step()

    def close(self) -> None:
        """Flush journals and give the KV memory back."""
        for journal in self._journals:
            journal.close()
        for p in self.parts.values():
            p.pool.close()

    # --- the router's ports, and the queue -----------------------------------------------------------------------

    def later(self, action: Callable[[], None]) -> None:
        """Put something at the end of the queue."""
        self._queue.append(action)

    def send(self, worker: str, order: Place | Cancel | Drain, attachment: bytes) -> None:
        self.later(lambda: self.workers[worker].on(order, attachment))

    def dismiss(self, worker: str) -> None:
        self.router.worker_lost(worker)

    def deliver(self, client: Any, message: Deliver, attachment: bytes) -> None:
        answer = self._answers.get(client)
        if answer is None:
            return  # cancelled
        tokens, extra = unpack_emit(message.count, attachment)
        answer.tokens += tokens
        answer.scores += extra.scores
        answer.prompt_scores += extra.prompt
        answer.cached = max(answer.cached, extra.cached)
        answer.vector += extra.vector
        if message.status:
            answer.error = BadRequest(message.why) if message.status == 400 else DiptychError(message.why)
        elif message.reason:
            answer.reason = Reason(message.reason)
        if answer.over:
            del self._answers[client]

    def _tick(self) -> None:
        now = self.clock()
        for driver in self.workers.values():
            deadline = driver.policy.next_deadline()
            if deadline is not None and deadline <= now:
                driver.on(Tick())

    def _record(self, folder: Path | None, name: str, spec: Any) -> Journal | None:
        if folder is None:
            return None
        journal = Journal(folder, name, 0, spec)
        self._journals.append(journal)
        return journal
