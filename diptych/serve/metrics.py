"""Prometheus metrics of the API process, and of the workers as they are at the moment of a scrape.

What is counted over workers that come and go is the router's (`telemetry.py`), and is shown behind these.

Names follow vLLM's after the prefix; `aliases.py` shows the ones that dashboards read under vLLM's names too. Not
responsible for measuring on workers: their numbers come from `Frontend.workers()`.
"""

from collections.abc import Iterable, Mapping, Sequence
from time import perf_counter
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from diptych.serve.aliases import Aliases, Collects
from diptych.serve.tally import Count, Spread

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_WAITS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.15,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    80.0,
)
_GAPS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.015, 0.025, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 10.0)
TOTALS = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 300.0, 900.0)

_LENGTHS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000)


class Metrics:
    """The registry of one API process and what requests observe into it. `model` is a label of the aliases."""

    def __init__(self, model: str = "") -> None:
        self.registry = CollectorRegistry()
        at = self.registry
        self.ttft = Histogram(
            "diptych_time_to_first_token_seconds", "Arrival to first token", buckets=_WAITS, registry=at
        )
        self.itl = Spread("diptych_inter_token_latency_seconds", "Gap between two tokens as sent", _GAPS, at)
        self.tpot = Histogram(
            "diptych_time_per_output_token_seconds", "Mean gap of one finished request", buckets=_GAPS, registry=at
        )
        self.decode = Histogram(
            "diptych_request_decode_time_seconds",
            "First token to last of one finished request",
            buckets=TOTALS,
            registry=at,
        )
        self.e2e = Histogram("diptych_e2e_request_latency_seconds", "Arrival to end", buckets=TOTALS, registry=at)
        self.prompt_tokens = Counter(
            "diptych_prompt_tokens",
            "Prompt tokens of requests that began to answer, or were to write nothing",
            registry=at,
        )
        self.cached_tokens = Counter("diptych_prompt_tokens_cached", "Those of them whose KV was found", registry=at)
        self.generation_tokens = Count("diptych_generation_tokens", "Tokens written", at)
        self.requests = Counter("diptych_requests", "Requests that left, by how", ["reason"], registry=at)
        self.prompt_lengths = Histogram(
            "diptych_request_prompt_tokens", "Prompt tokens of one finished request", buckets=_LENGTHS, registry=at
        )
        self.answer_lengths = Histogram(
            "diptych_request_generation_tokens", "Tokens one finished request wrote", buckets=_LENGTHS, registry=at
        )
        self.longest_answers = Histogram(
            "diptych_request_max_num_generation_tokens",
            "Tokens of the longest answer to one finished request",
            buckets=_LENGTHS,
            registry=at,
        )
        self.running = Gauge("diptych_requests_running", "Requests submitted and not yet left", registry=at)
        for reason in ("stop", "length", "computed", "cancelled", "rejected", "failed"):
            self.requests.labels(reason)  # a series that is there from the start can be rated from the start
        self._workers = _Workers()
        self.registry.register(self._workers)
        self._aliases = Aliases(model, self.aliased())
        self.registry.register(self._aliases)

    def aliased(self) -> dict[str, Collects]:
        """What has a name in vLLM's metrics, by that name."""
        return {
            "time_to_first_token_seconds": self.ttft,
            "inter_token_latency_seconds": self.itl,
            "time_per_output_token_seconds": self.itl,  # its older name
            "request_time_per_output_token_seconds": self.tpot,
            "request_decode_time_seconds": self.decode,
            "e2e_request_latency_seconds": self.e2e,
            "prompt_tokens": self.prompt_tokens,
            "generation_tokens": self.generation_tokens,
            "request_success": self.requests,
            "request_prompt_tokens": self.prompt_lengths,
            "request_generation_tokens": self.answer_lengths,
            "request_max_num_generation_tokens": self.longest_answers,
            "prefix_cache_queries": self.prompt_tokens,  # in tokens, as there
            "prefix_cache_hits": self.cached_tokens,
        }

    def expose(self, workers: Sequence[Mapping[str, Any]], routers: str = "") -> bytes:
        """The text of a scrape; `routers`: that of the router's own metrics."""
        self._workers.rows = self._aliases.rows = workers
        return generate_latest(self.registry) + routers.encode()


class Timer:
    """The times of one request, observed as they happen."""

    __slots__ = ("_arrived", "_first", "_last", "_metrics", "_num_prompt", "_num_tokens")

    def __init__(self, metrics: Metrics, arrived: float, num_prompt: int):
        self._metrics = metrics
        self._arrived = arrived
        self._num_prompt = num_prompt
        self._num_tokens = 0
        self._first = self._last = arrived
        metrics.running.inc()

    @property
    def arrived(self) -> float:
        """When the request came, on `perf_counter`."""
        return self._arrived

    @property
    def ttft_s(self) -> float | None:
        """Seconds to the first token, once it is there."""
        return self._first - self._arrived if self._num_tokens else None

    def tokens(self, count: int) -> None:
        """`count` tokens came, together: one gap as long as it was, and none between them."""
        if not count:
            return
        now = perf_counter()
        metrics = self._metrics
        if self._num_tokens == 0:
            self._first = now
            metrics.ttft.observe(now - self._arrived)
            metrics.prompt_tokens.inc(self._num_prompt)
        else:
            metrics.itl.observe(now - self._last)
        for _ in range(1, count):
            metrics.itl.observe(0.0)
        metrics.generation_tokens.value += count
        self._num_tokens += count
        self._last = now

    def computed(self) -> None:
        """The end came of a request that writes nothing."""
        self._last = perf_counter()
        self._metrics.prompt_tokens.inc(self._num_prompt)

    def end(self, reason: str, cached: int = 0) -> None:
        """The request left: `stop`, `length`, `computed`, `cancelled`, `rejected` or `failed`."""
        metrics = self._metrics
        metrics.running.dec()
        metrics.requests.labels(reason).inc()
        if reason not in ("stop", "length", "computed"):
            return
        metrics.cached_tokens.inc(cached)
        metrics.prompt_lengths.observe(self._num_prompt)
        metrics.answer_lengths.observe(self._num_tokens)
        metrics.e2e.observe(self._last - self._arrived)
        if self._num_tokens:
            metrics.decode.observe(self._last - self._first)
        if self._num_tokens > 1:
            metrics.tpot.observe((self._last - self._first) / (self._num_tokens - 1))


class _Workers:
    """Collector over the rows of `Frontend.workers()`."""

    def __init__(self) -> None:
        self.rows: Sequence[Mapping[str, Any]] = ()

    def collect(self) -> Iterable[Metric]:
        yield self._states()
        yield self._blocks()
        for field, what in (("running", "Requests in the batch"), ("waiting", "Requests not yet in the batch")):
            gauge = GaugeMetricFamily(f"diptych_worker_requests_{field}", what, labels=["worker", "role"])
            for row in self.rows:
                gauge.add_metric(_labels(row), float(row.get(field, 0)))
            yield gauge
        yield self._leases()

    def _states(self) -> Metric:
        gauge = GaugeMetricFamily(
            "diptych_worker_state", "1 for the state it is in", labels=["worker", "role", "state"]
        )
        for row in self.rows:
            gauge.add_metric([*_labels(row), str(row.get("state", "unknown"))], 1.0)
        return gauge

    def _leases(self) -> Metric:
        gauge = GaugeMetricFamily(
            "diptych_worker_leases",
            "Requests whose KV is offered to a peer, expected from one, or kept for one",
            labels=["worker", "role", "kind"],
        )
        for row in self.rows:
            for kind, number in (row.get("leases") or {}).items():
                gauge.add_metric([*_labels(row), str(kind)], float(number))
        return gauge

    def _blocks(self) -> Metric:
        gauge = GaugeMetricFamily("diptych_worker_blocks", "KV blocks by state", labels=["worker", "role", "state"])
        for row in self.rows:
            for state, number in (row.get("blocks") or {}).items():
                gauge.add_metric([*_labels(row), str(state)], float(number))
        return gauge


def _labels(row: Mapping[str, Any]) -> list[str]:
    return [str(row.get("id", "")), str(row.get("role", ""))]
