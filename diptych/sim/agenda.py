"""Virtual time: a heap of things to happen, in femtoseconds.

Whole numbers, so that n steps taken one by one and n steps taken as one end at exactly the same instant. Ties go by
rank (ends of steps first, by worker; then everything else; ticks last), then by the order in which things were put in.

Not responsible for what happens (`driver.py`).
"""

import heapq
from collections.abc import Callable
from typing import Any

SECOND = 10**15


def seconds(instant: int) -> float:
    """Femtoseconds as the seconds that policies are told."""
    return instant / SECOND


def instant(time_s: float) -> int:
    """Seconds as whole femtoseconds."""
    return round(time_s * SECOND)


def not_before(deadline_s: float) -> int:
    """The first instant at which a policy that compares seconds sees `deadline_s` as reached."""
    when = instant(deadline_s)
    while seconds(when) < deadline_s:  # a float of seconds is coarser than a femtosecond
        when += 1 + (when >> 53)
    return when


class Agenda:
    """What is to happen, soonest first."""

    def __init__(self) -> None:
        self.now = 0
        self.num_happened = 0
        self._heap: list[tuple[int, int, int, Callable[..., None], tuple[Any, ...]]] = []
        self._sequence = 0

    def at(self, when: int, rank: int, action: Callable[..., None], *args: Any) -> None:
        """Call `action(*args)` at that instant, or now if it is past."""
        self._sequence += 1
        heapq.heappush(self._heap, (max(when, self.now), rank, self._sequence, action, args))

    def step(self) -> bool:
        """Let the next thing happen; False when there is none."""
        if not self._heap:
            return False
        self.now, _, _, action, args = heapq.heappop(self._heap)
        self.num_happened += 1
        action(*args)
        return True
