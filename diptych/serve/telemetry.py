"""The router's metrics: KV on its way, handovers and failovers, over all workers that ever were.

They are counted here and not on the workers, so that none falls when a worker is started again. The API process shows
them behind its own. Not responsible for single requests (`records.py`).
"""

import logging
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from time import monotonic
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from diptych.serve.account import STALL_S, Received
from diptych.serve.aliases import Aliases, Collects
from diptych.serve.logs import about
from diptych.serve.metrics import TOTALS

log = logging.getLogger(__name__)

CAUSES = ("memory", "bandwidth", "peer", "answer")
REASONS = ("worker_lost", "peer_lost", "refused")
WARN_EVERY_S = 10.0
MAX_PAIRS = 4096  # of which there are series
_SLOW = 0.5  # of what a pair usually does

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.5, 5.0, 10.0)
_PAIR = ["source", "target"]
_WAY = [*_PAIR, "lane", "purpose"]


class Telemetry:
    """The registry of the router process."""

    def __init__(self) -> None:
        at = self.registry = CollectorRegistry()
        self.transfer = Histogram(
            "diptych_kv_transfer_seconds",
            "Of one handover: total, all its reads; exposed, what its client waited for KV after token 1",
            ["kind"],
            buckets=_SECONDS,
            registry=at,
        )
        self.gap = Histogram("diptych_handover_gap_seconds", "Token 1 to token 2", buckets=_SECONDS, registry=at)
        self.resume = Histogram(
            "diptych_resume_gap_seconds", "Last token before a failover to the next", buckets=_SECONDS, registry=at
        )
        self.queue = Histogram(
            "diptych_request_queue_time_seconds",
            "Of a request, on its first worker: to the first step of its prompt",
            buckets=TOTALS,
            registry=at,
        )
        self.prefill = Histogram(
            "diptych_request_prefill_time_seconds", "From there to its first token", buckets=TOTALS, registry=at
        )
        self.failovers = Counter("diptych_failovers", "Attempts that went on elsewhere", ["reason"], registry=at)
        self.exposed = Counter(
            "diptych_exposed_transfers", "Handovers whose exposed part exceeded 50 ms, by cause", ["cause"], registry=at
        )
        self.num_bytes = Counter("diptych_kv_transfer_bytes", "KV bytes read from peers", _WAY, registry=at)
        self.num_reads = Counter("diptych_kv_transfer_reads", "Reads that succeeded", _WAY, registry=at)
        self.num_failed = Counter("diptych_kv_transfer_failed", "Reads that failed", ["target"], registry=at)
        self.rate = Gauge("diptych_kv_transfer_gbps", "GB (1e9 bytes) a second of late", _PAIR, registry=at)
        for kind in ("total", "exposed"):
            self.transfer.labels(kind)  # a series that is there from the start can be rated from the start
        for cause in CAUSES:
            self.exposed.labels(cause)
        for reason in REASONS:
            self.failovers.labels(reason)
        self._seen: dict[tuple[str, ...], tuple[int, float]] = {}  # (incarnation, count) at the last look
        self._rates: dict[tuple[str, str], float] = {}
        self._pairs: OrderedDict[tuple[str, str], set[tuple[str, ...]]] = OrderedDict()  # the ways of each
        self._warned = -WARN_EVERY_S
        self._num_silent = 0

    def expose(self) -> str:
        """The text of a scrape."""
        return generate_latest(self.registry).decode()

    def alias(self, model: str) -> None:
        """Show under vLLM's names too what has one."""
        known: dict[str, Collects] = {
            "request_queue_time_seconds": self.queue,
            "request_prefill_time_seconds": self.prefill,
        }
        self.registry.register(Aliases(model, known, of_workers=False))

    def prefilled(self, queue_s: float, prefill_s: float) -> None:
        """A prompt is computed."""
        self.queue.observe(queue_s)
        self.prefill.observe(prefill_s)

    def failed_over(self, reason: str) -> None:
        """An attempt was given up, and another one placed."""
        self.failovers.labels(reason).inc()

    def resumed(self, gap_s: float) -> None:
        """A stream goes on after a failover."""
        self.resume.observe(gap_s)

    def handed_over(
        self, request: str, target: str, received: Received, gap: Mapping[str, Any], exposed_us: int
    ) -> None:
        """Token 2 is delivered. `gap`: the waterfall since token 1."""
        self.gap.observe(gap["us"] / 1e6)
        self.transfer.labels("total").observe(received.read_s)
        self.transfer.labels("exposed").observe(exposed_us / 1e6)
        usual = self._rates.get((received.source, target))
        if received.read_s > 0:
            rate = received.num_bytes / received.read_s / 1e9
            average = rate if usual is None else 0.8 * usual + 0.2 * rate
            self._rates[received.source, target] = average
            self.rate.labels(received.source, target).set(average)
        if exposed_us > 1e6 * STALL_S:
            cause = _cause(received, gap["parts"], usual)
            self.exposed.labels(cause).inc()
            self._warn(request, target, received, gap["parts"], exposed_us, cause)

    def _warn(
        self, request: str, target: str, received: Received, parts: Mapping[str, int], exposed_us: int, cause: str
    ) -> None:
        """Say why, but not at every one: what was not said is counted."""
        now = monotonic()
        if now - self._warned < WARN_EVERY_S:
            self._num_silent += 1
            return
        rate = received.num_bytes / received.read_s / 1e9 if received.read_s else 0.0
        log.warning(
            "waited %.0f ms for KV from %s to %s; cause: %s (%d bytes over %s at %.3f GB/s; "
            "%.0f ms for memory, %.0f ms for reads, %.0f ms for the answer); %d more since the last such line",
            exposed_us / 1e3, received.source, target, cause, received.num_bytes, received.lane, rate,
            *(parts.get(name, 0) / 1e3 for name in ("memory", "transfer", "answer")), self._num_silent,
            extra=about(request, received.rid),
        )  # fmt: skip
        self._warned, self._num_silent = now, 0

    def look(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add what each worker has read since the last look; what a dead one read after it is not known."""
        for row in rows:
            worker, kv = str(row.get("id", "")), row.get("kv") or {}
            incarnation = int(row.get("incarnation", 0))
            for moved in kv.get("moved", ()):
                way = (moved["source"], worker, moved["lane"], moved["purpose"])
                self._use(way)
                self.num_bytes.labels(*way).inc(self._more(incarnation, ("bytes", *way), moved["bytes"]))
                self.num_reads.labels(*way).inc(self._more(incarnation, ("reads", *way), moved["reads"]))
            self.num_failed.labels(worker).inc(self._more(incarnation, ("failed", worker), kv.get("failed", 0)))

    def _use(self, way: tuple[str, ...]) -> None:
        """Where workers come and go under ever new names, the pairs that were idle for longest are shown no more."""
        pair = (way[0], way[1])
        self._pairs.setdefault(pair, set()).add(way)
        self._pairs.move_to_end(pair)
        if len(self._pairs) > MAX_PAIRS:
            gone, ways = self._pairs.popitem(last=False)
            for each in ways:
                self.num_bytes.remove(*each)
                self.num_reads.remove(*each)
                self._seen.pop(("bytes", *each), None)
                self._seen.pop(("reads", *each), None)
            if self._rates.pop(gone, None) is not None:
                self.rate.remove(*gone)

    def _more(self, incarnation: int, what: tuple[str, ...], count: float) -> float:
        """How much a worker's own count grew; it begins at 0 with each incarnation, and whenever it has fallen."""
        known, before = self._seen.get(what, (incarnation, 0.0))
        self._seen[what] = (incarnation, count)
        return count - before if known == incarnation and count >= before else count


def _cause(received: Received, parts: Mapping[str, int], usual: float | None) -> str:
    """The longest part; reads that are slower than is usual between the two are the peer's, others the bandwidth's."""
    longest = max(("memory", "transfer", "answer"), key=lambda name: parts.get(name, 0))
    if longest != "transfer":
        return longest
    rate = received.num_bytes / received.read_s / 1e9 if received.read_s else 0.0
    return "peer" if usual is not None and rate < _SLOW * usual else "bandwidth"
