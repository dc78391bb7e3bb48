"""One simulated worker: its policy object, and the executor that pretends to run its steps.

Steps run one after the other. Where the policy's horizon and the oracle allow it, repetitions of a step run as
one `Execution` that can be cut at any whole step.

Not responsible for messages, reads or deaths (`driver.py`).
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from diptych.policy.batching import WorkerSpec
from diptych.policy.messages import Place, Run, Slice, StepDone, request_of
from diptych.policy.worker import Worker
from diptych.sim.agenda import seconds
from diptych.sim.costs import CostModel, done_by, elapsed
from diptych.sim.streams import Stretch
from diptych.sim.workload import Arrival


@dataclass(slots=True)
class Execution:
    """A step being computed, `count` times in a row as far as is known."""

    run: Run
    started: int
    first: int
    growth: int
    count: int = 1
    planned: bool = False  # its end is on the agenda

    def end(self, count: int) -> int:
        """The instant at which that many repetitions are done."""
        return self.started + elapsed(self.first, self.growth, count)

    def stretch(self, count: int) -> Stretch:
        """When each of so many tokens comes."""
        return Stretch(count, self.started, self.first, self.growth)


class Machine:
    """A worker of the cluster, alive or not."""

    def __init__(self, index: int, spec: WorkerSpec, cost: CostModel, oracle: Sequence[Arrival]):
        self.index = index
        self.spec = spec
        self.incarnation = 0
        self.alive = True
        self.worker = Worker(spec)
        self.tick_at: int | None = None
        self.execution: Execution | None = None
        self.busy = 0  # femtoseconds of computing
        self.num_steps = 0
        self.num_preempted = 0  # by earlier incarnations
        self.placed: set[int] = set()  # attempts this process was given
        self._cost = cost
        self._oracle = oracle
        self._queue: deque[Run] = deque()

    def submit(self, run: Run, when: int) -> bool:
        """Take a step; True if it starts at once."""
        self._queue.append(run)
        return self.execution is None and self.start(when)

    def start(self, when: int) -> bool:
        """Start the next step, if there is one."""
        if not self._queue:
            return False
        run = self._queue.popleft()
        num_new = sum(piece.count for piece in run.slices)
        first = self._cost.step(num_new, sum(piece.start + piece.count for piece in run.slices))
        self.execution = Execution(run, when, first, self._cost.growth(len(run.slices)) or 0)
        return True

    def repeats(self) -> int:
        """How often the step under way may run before anything could change, as far as policy and oracle know."""
        execution = self.execution
        if execution is None or self._queue or self._cost.growth(1) is None:
            return 1
        horizon = self.worker.horizon()
        if horizon > 1:
            horizon = min(horizon, *(1 + self._left(piece) for piece in execution.run.slices))
        return max(horizon, 1)

    def whole_steps(self, when: int) -> int:
        """How many steps of the execution under way are done at that instant."""
        execution = self.execution
        return 0 if execution is None else done_by(execution.first, execution.growth, when - execution.started)

    def finish(self, count: int) -> tuple[Stretch, StepDone]:
        """End the execution after `count` repetitions; when each token came, and what to tell the policy."""
        execution = self.execution
        assert execution is not None
        self.execution = None
        span = elapsed(execution.first, execution.growth, count)
        self.busy += span
        self.num_steps += count
        slices = execution.run.slices
        stopped = tuple(piece.rid for piece in slices if piece.sample and self._stops(piece, count))
        filled = tuple((piece.rid, digest) for piece in slices for digest in self._filled(piece, count))
        return execution.stretch(count), StepDone(execution.run.step, seconds(span), count, stopped, filled)

    def die(self) -> None:
        """Its process is gone, and whatever it was computing."""
        self.alive = False
        self.execution = None
        self._queue.clear()
        self.num_preempted += self.worker.num_preempted
        self.tick_at = None

    def revive(self) -> None:
        """A fresh process takes its place."""
        self.alive = True
        self.incarnation += 1
        self.worker = Worker(self.spec)
        self.placed = set()

    def place(self, place: Place) -> Place:
        """An attempt arrives; hashes of what earlier ones wrote are added, as a real driver would from the tokens."""
        self.placed.add(place.rid)
        size, arrival = self.spec.block_size, self._arrival(place.rid)
        if len(place.hashes) < place.num_prompt // size:
            return place  # no prefix of it is to be found
        return replace(place, hashes=tuple(arrival.text_hash(i) for i in range(place.num_tokens // size)))

    def _arrival(self, rid: int) -> Arrival:
        return self._oracle[request_of(rid)]

    def _left(self, piece: Slice) -> int:
        """Tokens the answer still has after the one this step samples."""
        arrival = self._arrival(piece.rid)
        return arrival.output_len + arrival.num_prompt - (piece.start + piece.count) - 1

    def _stops(self, piece: Slice, count: int) -> bool:
        """The last token sampled is the stop token."""
        arrival = self._arrival(piece.rid)
        return arrival.output_len < arrival.max_new and self._left(piece) - (count - 1) == 0

    def _filled(self, piece: Slice, count: int) -> list[bytes]:
        """The hashes of the blocks that became full, as a real driver would compute them from the tokens."""
        if self.worker.seqs[piece.rid].ended is not None:
            return []  # a real driver has forgotten its tokens by now
        known = len(self.worker.seqs[piece.rid].hashes)
        full = (piece.start + piece.count + count - 1) // self.spec.block_size
        if full <= known:
            return []
        arrival = self._arrival(piece.rid)
        return [arrival.text_hash(index) for index in range(known, full)]
