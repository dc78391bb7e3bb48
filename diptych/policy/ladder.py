"""The two ladders: the life of a request and the life of a transfer, as data.

Live or simulated, whoever moves one of them up calls `climb`, which refuses a step that is not drawn here. Not
responsible for what a step means; `worker.py` and `router.py` know that.
"""

from enum import StrEnum
from typing import Generic, TypeVar


class Rung(StrEnum):
    """Where a request stands."""

    QUEUED = "queued"  # waits for memory or for its turn
    PREFILLING = "prefilling"  # its prompt is being computed
    HANDOVER = "handover"  # its KV goes from the prefill side to the decode side
    DECODING = "decoding"
    FINISHED = "finished"
    REJECTED = "rejected"
    CANCELLED = "cancelled"
    FAILED = "failed"
    RESUMING = "resuming"  # its worker was lost; it is being placed again


class Stage(StrEnum):
    """Where a transfer stands."""

    OFFERED = "offered"
    READING = "reading"
    VERIFIED = "verified"
    FAILED = "failed"
    QUARANTINED = "quarantined"  # cancelled or failed, and bytes may still land
    SETTLED = "settled"


_ENDS = {Rung.FINISHED, Rung.CANCELLED, Rung.FAILED}

REQUEST: dict[Rung, frozenset[Rung]] = {
    Rung.QUEUED: frozenset({Rung.PREFILLING, Rung.HANDOVER, Rung.DECODING, Rung.RESUMING, Rung.REJECTED, *_ENDS}),
    Rung.PREFILLING: frozenset({Rung.QUEUED, Rung.HANDOVER, Rung.DECODING, Rung.RESUMING, *_ENDS}),
    Rung.HANDOVER: frozenset({Rung.QUEUED, Rung.DECODING, Rung.RESUMING, *_ENDS}),
    Rung.DECODING: frozenset({Rung.QUEUED, Rung.RESUMING, *_ENDS}),
    Rung.RESUMING: frozenset({Rung.QUEUED, Rung.PREFILLING, Rung.REJECTED, *_ENDS}),
    Rung.FINISHED: frozenset(),
    Rung.REJECTED: frozenset(),
    Rung.CANCELLED: frozenset(),
    Rung.FAILED: frozenset(),
}
"""queued -> handover is a decode side that waits; decoding -> queued a preemption (it computes its KV again)."""

TRANSFER: dict[Stage, frozenset[Stage]] = {
    Stage.OFFERED: frozenset({Stage.READING, Stage.FAILED, Stage.SETTLED}),
    Stage.READING: frozenset({Stage.OFFERED, Stage.VERIFIED, Stage.FAILED, Stage.QUARANTINED}),
    Stage.VERIFIED: frozenset({Stage.SETTLED, Stage.FAILED}),
    Stage.FAILED: frozenset({Stage.QUARANTINED, Stage.SETTLED}),
    Stage.QUARANTINED: frozenset({Stage.SETTLED, Stage.OFFERED, Stage.READING, Stage.FAILED}),
    Stage.SETTLED: frozenset(),
}
"""quarantined -> reading: the reader gave its memory to an older request and starts over; the source still holds it."""


R = TypeVar("R", bound=StrEnum)


class Ladder(Generic[R]):
    """One request's or transfer's place on its ladder, and the time it reached each rung (last visit)."""

    __slots__ = ("_edges", "at", "since", "spent")

    def __init__(self, edges: dict[R, frozenset[R]], start: R, now: float):
        self._edges = edges
        self.at = start
        self.since = now
        self.spent: dict[R, float] = {}

    def climb(self, to: R, now: float) -> None:
        """Move to another rung; staying where one is costs nothing. Raises ValueError for a step not drawn."""
        if to == self.at:
            return
        if to not in self._edges[self.at]:
            raise ValueError(f"no step from {self.at} to {to}")
        self.spent[self.at] = self.spent.get(self.at, 0.0) + now - self.since
        self.at = to
        self.since = now

    def durations(self) -> tuple[tuple[str, float], ...]:
        """Seconds spent on every rung left so far; they add up to now minus the start, exactly where it ended."""
        return tuple((str(rung), spent) for rung, spent in self.spent.items())
