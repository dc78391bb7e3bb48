"""What a worker measures of each request on its own clock, and tells the router: durations and counts.

Readings of a clock mean nothing to another process, so none leaves this one. Policy hears nothing of it. Not
responsible for what the durations add up to (`waterfall.py`), nor for keeping them (`records.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diptych.policy.messages import Place, Pull, Purpose, Read, Role, Run

STALL_S = 0.05  # a gap between two tokens that is worth a word
MAX_NOTED = 64  # causes noted of one request
PHASES = ("memory", "transfer", "answer", "queue", "step")  # of a handover, as they follow each other


@dataclass(frozen=True, slots=True)
class Prefilled:
    """A prompt was computed here. `queue_s`: from `Place` to its first step; `prefill_s`: from there to its token."""

    rid: int
    queue_s: float
    prefill_s: float
    num_computed: int  # tokens
    num_cached: int
    num_steps: int


@dataclass(frozen=True, slots=True)
class Received:
    """KV came from `source` and the first step with it is done.

    `phases` follow each other from the moment all of it was published (or from our own `Place`, where that came later):
    `memory` no read under way for want of blocks, `transfer` reading, `answer` until the source agreed, `queue` until
    the first step was ordered, `step` until it was done. `read_s` is the sum over all reads; `hidden_s` the time spent
    reading before `phases` begin.
    """

    rid: int
    source: str
    lane: str
    codec: str
    why: str  # that codec
    num_bytes: int
    num_reads: int
    num_failed: int  # or cancelled
    read_s: float
    hidden_s: float
    phases: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class Stalled:
    """What held tokens of an answer up here: (number of the token, cause)."""

    rid: int
    causes: tuple[tuple[int, str], ...]


Account = Prefilled | Received | Stalled


class Prompt:
    """The stopwatch of a prompt that is computed here."""

    __slots__ = ("_began", "_num_computed", "_num_steps", "_placed")

    def __init__(self, now: float):
        self._placed = now
        self._began: float | None = None
        self._num_computed = self._num_steps = 0

    def ran(self, now: float, count: int) -> None:
        """A step with `count` of its tokens was ordered."""
        self._began = now if self._began is None else self._began
        self._num_computed += count
        self._num_steps += 1

    def account(self, rid: int, now: float, num_cached: int) -> Prefilled:
        """Its token is here."""
        began = now if self._began is None else self._began
        return Prefilled(rid, began - self._placed, now - began, self._num_computed, num_cached, self._num_steps)


class Arrival:
    """The stopwatch of KV on its way here. It is in one phase at a time, so the phases add up to the whole."""

    __slots__ = (
        "_at", "_final", "_num_bytes", "_num_failed", "_num_reads", "_read_s", "_reading", "_since", "_spent", "source"
    )  # fmt: skip

    def __init__(self, source: str, now: float):
        self.source = source
        self._spent: dict[str, float] = {}
        self._at, self._since = "early", now
        self._final = False
        self._reading = self._num_bytes = self._num_reads = self._num_failed = 0
        self._read_s = 0.0

    def final(self, now: float) -> None:
        """All of it is published at the source."""
        self._final = True
        self._look(now)

    def pulled(self, now: float) -> None:
        """A read began."""
        self._reading += 1
        self._look(now)

    def read(self, now: float, num_bytes: int, elapsed_s: float) -> None:
        """A read is over and verified."""
        self._num_reads += 1
        self._num_bytes += num_bytes
        self._read_s += elapsed_s
        self._settle(now)

    def failed(self, now: float) -> None:
        """A read failed, or was cancelled, and has settled."""
        self._num_failed += 1
        self._settle(now)

    def _settle(self, now: float) -> None:
        self._reading -= 1
        self._look(now)

    def _look(self, now: float) -> None:
        """What it waits for, where that is KV."""
        if self._final:
            self.enter(now, "transfer" if self._reading else "memory")
        else:
            self.enter(now, "reading" if self._reading else "early")

    def enter(self, now: float, phase: str) -> None:
        """The next phase begins."""
        self._spent[self._at] = self._spent.get(self._at, 0.0) + now - self._since
        self._at, self._since = phase, now

    def ran(self, now: float, count: int) -> None:
        """The step that continues it was ordered; where its KV had to be computed here, one of several."""
        if self._at != "step":
            self.enter(now, "step")

    def account(self, rid: int, now: float, lane: str) -> Received:
        """Its first token of this worker is here."""
        self.enter(now, "")
        phases = tuple((phase, self._spent.get(phase, 0.0)) for phase in PHASES)
        hidden_s = self._spent.get("reading", 0.0)
        counts = (self._num_bytes, self._num_reads, self._num_failed)
        return Received(rid, self.source, lane, "raw", "", *counts, self._read_s, hidden_s, phases)


@dataclass(slots=True)
class Moved:
    """KV read from one peer since this worker started, for one purpose."""

    num_bytes: int = 0
    num_reads: int = 0


class Accounts:
    """The stopwatches of one worker. `lane(peer)` says how its blocks come.

    A request has one until its first token from here, so what comes after costs nothing.
    """

    def __init__(self, lane: Callable[[str], str]):
        self._lane = lane
        self._moved: dict[tuple[str, str, Purpose], Moved] = {}  # by (source, lane, purpose)
        self._open: dict[int, Prompt | Arrival] = {}
        self._pulls: dict[int, Pull] = {}
        self._causes: dict[int, dict[int, str]] = {}

    def __contains__(self, rid: int) -> bool:
        return rid in self._open

    def placed(self, now: float, place: Place) -> None:
        """A request, or its part, comes here."""
        decodes = place.part == Role.DECODE
        self._open[place.rid] = Arrival(place.peer, now) if decodes else Prompt(now)

    def forget(self, rid: int) -> None:
        """It ended."""
        self._open.pop(rid, None)
        self._causes.pop(rid, None)

    def ordered(self, now: float, run: Run) -> None:
        """A step was ordered."""
        if self._open:
            for piece in run.slices:
                watch = self._open.get(piece.rid)
                if watch is not None:
                    watch.ran(now, piece.count)

    def arriving(self, rid: int) -> Arrival | None:
        """The stopwatch of KV that is on its way here."""
        watch = self._open.get(rid)
        return watch if isinstance(watch, Arrival) else None

    def pulled(self, now: float, order: Pull) -> None:
        """A read was ordered."""
        self._pulls[order.pull] = order
        coming = self._of(order)
        if coming is not None:
            coming.pulled(now)

    def reading(self, pull: int) -> int:
        """Whose KV a read brings; -1 where that is not known."""
        order = self._pulls.get(pull)
        return -1 if order is None else order.rid

    def read(self, now: float, event: Read) -> None:
        """A read is over and verified."""
        order = self._pulls.pop(event.pull, None)
        if order is None:
            return
        moved = self._moved.setdefault((order.peer, self._lane(order.peer), order.purpose), Moved())
        moved.num_bytes += event.num_bytes
        moved.num_reads += 1
        coming = self._of(order)
        if coming is not None:
            coming.read(now, event.num_bytes, event.elapsed_s)

    def settled(self, now: float, pull: int) -> None:
        """A read came to nothing."""
        order = self._pulls.pop(pull, None)
        coming = self._of(order) if order is not None else None
        if coming is not None:
            coming.failed(now)

    def _of(self, order: Pull) -> Arrival | None:
        return self.arriving(order.rid) if order.purpose == Purpose.HANDOVER else None

    def close(self, now: float, rid: int, num_cached: int) -> Prefilled | Received:
        """Its first token of this worker is here, or the end of what writes none."""
        watch = self._open.pop(rid)
        if isinstance(watch, Prompt):
            return watch.account(rid, now, num_cached)
        return watch.account(rid, now, self._lane(watch.source))

    def forget_peer(self, peer: str) -> None:
        """It is gone; who comes under that name is counted from the start."""
        self._moved = {way: moved for way, moved in self._moved.items() if way[0] != peer}

    def totals(self) -> list[dict[str, Any]]:
        """What was read from those that are still there, by source, lane and purpose."""
        return [
            {"source": source, "lane": lane, "purpose": str(purpose), "bytes": m.num_bytes, "reads": m.num_reads}
            for (source, lane, purpose), m in self._moved.items()
        ]

    # --- stalls --------------------------------------------------------------------------------------------------

    def note(self, rid: int, token: int, cause: str) -> None:
        """That token comes late, and why; what was noted first is the cause."""
        causes = self._causes.setdefault(rid, {})
        if len(causes) < MAX_NOTED:
            causes.setdefault(token, cause)

    def stalls(self, rid: int) -> Stalled | None:
        """What was noted of a request."""
        causes = self._causes.get(rid)
        return Stalled(rid, tuple(causes.items())) if causes else None


def cause_of(run: Run, elapsed_s: float, gap_s: float) -> str:
    """Why a step ended so late after the one before: a prompt was in it, it took long itself, or the worker did."""
    if any(piece.count > 1 for piece in run.slices):
        return "prefill"
    return "step" if elapsed_s > gap_s / 2 else "worker"
