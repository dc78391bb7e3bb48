"""The metrics that existing dashboards read, under vLLM's names: made of ours at the moment of a scrape.

Nothing is counted twice: a sample is ours with another name and vLLM's labels, `model_name` and `engine` (a worker's
id; "0" for what the API process sees). Not responsible for our own names (`metrics.py`).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.samples import Sample

_REASONS = {"stop": "stop", "length": "length", "cancelled": "abort", "failed": "error"}
"""Ours to vLLM's; one that was rejected did not finish there either, one that wrote nothing has no such reason."""

_USED = ("held", "reserved", "offered", "quarantined")


class Collects(Protocol):
    """What prometheus_client's metrics are."""

    def collect(self) -> Iterable[Metric]:
        """The samples as they are now."""


class Aliases:
    """Collector of the aliases. `rows` are those of `Frontend.workers()`; without `of_workers` nobody has any."""

    def __init__(self, model: str, originals: Mapping[str, Collects], of_workers: bool = True):
        self.rows: Sequence[Mapping[str, Any]] = ()
        self._of_workers = of_workers
        self._model = model
        self._originals = originals

    def describe(self) -> Iterable[Metric]:
        """Nothing before the first scrape."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """Every alias."""
        for name, original in self._originals.items():
            for metric in original.collect():
                yield self._renamed(f"vllm:{name}", metric)
        if self._of_workers:
            yield from self._gauges()

    def _gauges(self) -> Iterable[Metric]:
        yield self._gauge("vllm:num_requests_running", "Requests in the batch", lambda row: row.get("running"))
        yield self._gauge("vllm:num_requests_waiting", "Requests not yet in the batch", lambda row: row.get("waiting"))
        yield self._gauge("vllm:kv_cache_usage_perc", "KV blocks in use; 1 is all of them", _usage)

    def _renamed(self, name: str, metric: Metric) -> Metric:
        labels = {"model_name": self._model, "engine": "0"}
        renamed = Metric(name, metric.documentation, metric.type)
        for sample in metric.samples:
            own = dict(sample.labels)
            reason = own.pop("reason", None)
            if reason is not None:
                if reason not in _REASONS:
                    continue
                own["finished_reason"] = _REASONS[reason]
            end = sample.name.removeprefix(metric.name)
            renamed.samples.append(Sample(name + end, labels | own, sample.value))
        return renamed

    def _gauge(self, name: str, what: str, value: Any) -> Metric:
        gauge = GaugeMetricFamily(name, what, labels=["model_name", "engine"])
        for row in self.rows:
            number = value(row)
            if number is not None:
                gauge.add_metric([self._model, str(row.get("id", ""))], float(number))
        return gauge


def _usage(row: Mapping[str, Any]) -> float | None:
    blocks = row.get("blocks") or {}
    total = sum(blocks.values())
    return sum(blocks.get(state, 0) for state in _USED) / total if total else None
