"""What is observed for every token: a histogram and a counter for one thread, without the locks of prometheus_client.

They show up in a scrape as its own do. Not responsible for what is counted (`metrics.py`).
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric


class Spread:
    """A histogram without labels."""

    __slots__ = ("_bounds", "_counts", "_name", "_total", "_what")

    def __init__(self, name: str, what: str, buckets: Sequence[float], registry: CollectorRegistry):
        self._name = name
        self._what = what
        self._bounds = (*buckets, float("inf"))
        self._counts = [0] * len(self._bounds)
        self._total = 0.0
        registry.register(self)

    def observe(self, value: float) -> None:
        """Count a value in the first bucket that reaches up to it."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value

    def collect(self) -> Iterable[Metric]:
        """The samples as they are now."""
        shown = [str(float(bound)) for bound in self._bounds[:-1]]
        buckets = list(zip([*shown, "+Inf"], map(float, accumulate(self._counts)), strict=True))
        yield HistogramMetricFamily(self._name, self._what, buckets, self._total)


class Count:
    """A counter without labels."""

    __slots__ = ("_name", "_what", "value")

    def __init__(self, name: str, what: str, registry: CollectorRegistry):
        self._name = name
        self._what = what
        self.value = 0
        registry.register(self)

    def collect(self) -> Iterable[Metric]:
        """The sample as it is now."""
        yield CounterMetricFamily(self._name, self._what, self.value)
