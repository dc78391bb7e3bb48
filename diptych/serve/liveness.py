"""Who has not shown a sign of life for too long: found by progress, not by asking.

A process that was stopped, or hangs, keeps its connections open, so their end says nothing. Each says by itself, every
`PULSE_S`, that its event loop turns, and for how long the step it computes has taken; anything else it says counts as
well. Silence is counted in looks of our own, each worth at most two pulses: whoever looks late was late itself, and
condemns nobody for that. Not responsible for what becomes of those who are found.
"""

import contextlib
import os
import signal
from collections.abc import Hashable
from typing import Generic, TypeVar

PULSE_S = 0.5
STEP_S = 60.0  # a step may take so long at least, whatever the bound on silence is ...
STEP_FACTOR = 6  # ... or so many times that bound


K = TypeVar("K", bound=Hashable)


class Liveness(Generic[K]):
    """Keeps watch over others, whatever stands for them. `stuck_s`: how long one may be silent; 0: for ever."""

    def __init__(self, stuck_s: float):
        self._stuck_s = stuck_s
        self._step_s = max(STEP_S, STEP_FACTOR * stuck_s)
        self._silent_s: dict[K, float] = {}
        self._computing_s: dict[K, float] = {}
        self._looked: float | None = None

    def heard(self, who: K, computing_s: float | None = None) -> None:
        """A sign of life; `computing_s`: since when its present step is being computed, where it says so."""
        self._silent_s[who] = 0.0
        if computing_s is not None:
            self._computing_s[who] = computing_s

    def forget(self, who: K) -> None:
        """It is not watched any more."""
        self._silent_s.pop(who, None)
        self._computing_s.pop(who, None)

    def look(self, now: float) -> list[tuple[K, str]]:
        """Who is stuck, and why; to be called about every `PULSE_S`."""
        elapsed_s = 0.0 if self._looked is None else min(now - self._looked, 2 * PULSE_S)
        self._looked = now
        for who in self._silent_s:
            self._silent_s[who] += elapsed_s
        return [(who, why) for who in self._silent_s if (why := self._why(who))] if self._stuck_s else []

    def _why(self, who: K) -> str:
        silent_s, computing_s = self._silent_s[who], self._computing_s.get(who, 0.0)
        if silent_s > self._stuck_s:
            return f"it showed no sign of life for {silent_s:.1f} s"
        if computing_s > self._step_s:
            return f"its step has not ended for {computing_s:.0f} s"
        return ""


def end(pid: int) -> None:
    """Kill a process of this host: one that is stopped hears no other signal. What runs on its own is left alone."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)
