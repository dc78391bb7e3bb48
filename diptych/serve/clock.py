"""The live drivers' clock: monotonic, and never the same reading twice, so that time orders a journal."""

import math
import time


class Clock:
    """Seconds of the host's monotonic clock; strictly increasing."""

    __slots__ = ("_last",)

    def __init__(self) -> None:
        self._last = 0.0

    def __call__(self) -> float:
        now = time.monotonic()
        self._last = now if now > self._last else math.nextafter(self._last, math.inf)
        return self._last
