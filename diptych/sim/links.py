"""Links on which concurrent transfers share the bandwidth fairly: exact processor sharing, event by event.

While n transfers are under way each gets 1/n of the link. `served` is what a transfer that had always been there would
have got; one of `num_bytes` that joins at `served` is over when `served` has grown by as much. So the order in which
transfers end never changes while they run, and a heap is all it takes (Parekh and Gallager's virtual time).

Not responsible for which transfers exist (`driver.py`).
"""

import heapq
from collections.abc import Hashable
from math import ceil

from diptych.sim.agenda import SECOND


class SharedLink:
    """One link. All instants are femtoseconds and must not go backwards."""

    def __init__(self, bytes_per_s: float):
        self._per_fs = bytes_per_s / SECOND
        self._served = 0.0
        self._at = 0
        self._ends: dict[Hashable, float] = {}
        self._heap: list[tuple[float, int, Hashable]] = []
        self._sequence = 0

    def add(self, now: int, key: Hashable, num_bytes: int) -> None:
        """A transfer begins."""
        self._advance(now)
        self._sequence += 1
        self._ends[key] = self._served + num_bytes
        heapq.heappush(self._heap, (self._ends[key], self._sequence, key))

    def remove(self, now: int, key: Hashable) -> None:
        """A transfer ends, or is given up."""
        self._advance(now)
        self._ends.pop(key, None)
        while self._heap and self._heap[0][2] not in self._ends:
            heapq.heappop(self._heap)
        if not self._ends:
            self._served = 0.0  # keeps the numbers small, and so exact

    def next_end(self) -> tuple[int, Hashable] | None:
        """When which transfer will be over if nothing changes before."""
        if not self._heap:
            return None
        end, _, key = self._heap[0]
        return self._at + ceil(max(end - self._served, 0.0) * len(self._ends) / self._per_fs), key

    def _advance(self, now: int) -> None:
        if self._ends:
            self._served += (now - self._at) * self._per_fs / len(self._ends)
        self._at = now
