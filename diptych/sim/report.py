"""What a simulation showed: latencies, goodput, and how busy who was.

Definitions are the field's: TTFT from arrival to the first token; ITL the gaps between tokens; TPOT their mean for one
request; e2e from arrival to the last token; handover gap the first of the gaps where prefill and decode were apart.
What writes nothing (an embedding) has an end instead of tokens: it counts in queue and e2e alone.

Not responsible for running anything (`run.py`).
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from rich.console import Console, Group
from rich.table import Table

from diptych.sim.agenda import seconds
from diptych.sim.costs import elapsed
from diptych.sim.driver import SimResult
from diptych.sim.streams import Stream

QUANTILES = (0.5, 0.9, 0.99)
PIECES = 16  # a stretch of slowly growing gaps counts as this many different ones at most


class Objective(Protocol):
    """What counts as good service, like `bench.slo.Slo`: times in seconds, `itl` the longest gap."""

    def met(self, ttft: float, tpot: float, itl: float, e2e: float) -> bool:
        """A request with these times was served well."""
        ...


@dataclass(frozen=True, slots=True)
class Quantiles:
    """p50, p90, p99 and the largest of a measure, in seconds."""

    p50: float
    p90: float
    p99: float
    worst: float
    num: int


@dataclass(frozen=True, slots=True)
class RequestTimes:
    """One finished request, in seconds. `gap` is 0 where nothing was handed over, `tpot` where there is one token."""

    ttft: float
    tpot: float
    e2e: float
    queue: float
    stall: float
    gap: float


@dataclass(frozen=True, slots=True)
class Report:
    """Everything worth showing of a simulation. Rates are per second of simulated time."""

    counts: dict[str, int]
    measures: dict[str, Quantiles]
    num_good: int
    num_tokens: int
    duration_s: float
    request_rate: float
    token_rate: float
    goodput: float | None  # None: nobody said what counts as good
    whys: dict[str, int]  # of requests that did not finish: what the router said, and how often
    kv_bytes: int
    busy: dict[str, float]
    num_preempted: int


def quantiles(samples: Iterable[tuple[float, int]]) -> Quantiles:
    """Of (value, weight) pairs; nearest rank. All zero where there are none."""
    ordered = sorted(samples)
    total = sum(weight for _, weight in ordered)
    if not total:
        return Quantiles(0.0, 0.0, 0.0, 0.0, 0)
    found: list[float] = []
    seen = 0
    for value, weight in ordered:
        seen += weight
        while len(found) < len(QUANTILES) and seen >= QUANTILES[len(found)] * total:
            found.append(value)
    return Quantiles(found[0], found[1], found[2], ordered[-1][0], total)


def times_of(stream: Stream) -> RequestTimes:
    """What one finished request took."""
    arrived = stream.arrival.time_s
    first = last = seconds(stream.ended)
    if stream.stretches:
        last_stretch = stream.stretches[-1]
        first, last = seconds(stream.stretches[0].token(0)), seconds(last_stretch.token(last_stretch.num - 1))
    gaps = gaps_of(stream)
    return RequestTimes(
        ttft=first - arrived,
        tpot=(last - first) / max(stream.num_tokens - 1, 1),
        e2e=last - arrived,
        queue=seconds(stream.began) - arrived,
        stall=max((gap for gap, _ in gaps), default=0.0),
        gap=gaps[0][0] if stream.paired and gaps else 0.0,
    )


def gaps_of(stream: Stream) -> list[tuple[float, int]]:
    """The gaps between its tokens as (seconds, how many), oldest first. The first and the largest are exact."""
    gaps: list[tuple[float, int]] = []
    before: int | None = None
    for stretch in stream.stretches:
        if before is not None:
            gaps.append((seconds(stretch.token(0) - before), 1))
        rest = stretch.num - 1
        if rest and stretch.growth == 0:
            gaps.append((seconds(stretch.first), rest))
        elif rest:
            gaps += _pieces(stretch.first, stretch.growth, rest, alone=not gaps)
        before = stretch.token(rest)
    return gaps


def _pieces(first: int, growth: int, num: int, alone: bool) -> list[tuple[float, int]]:
    """Gaps first + growth, first + 2 growth, ... as few different ones; their sum is exact, and the last one is."""
    pieces: list[tuple[float, int]] = []
    begin = 1
    if alone and num > 1:  # the very first gap of a stream is a measure of its own
        pieces.append((seconds(first + growth), 1))
        begin = 2
    size = -(-num // PIECES)
    while begin < num:
        end = min(begin + size, num)  # the last one stands alone
        total = elapsed(first, growth, end) - elapsed(first, growth, begin)
        pieces.append((seconds(total) / (end - begin), end - begin))
        begin = end
    return [*pieces, (seconds(first + growth * num), 1)]


def summarize(result: SimResult, slo: Objective | None = None) -> Report:
    """Count and measure. Only finished requests have latencies; only those within the SLO are good."""
    done = [stream for stream in result.streams if stream.status == "finished"]
    times = [times_of(stream) for stream in done]
    num_good = sum(slo is None or slo.met(one.ttft, one.tpot, one.stall, one.e2e) for one in times)
    num_tokens = sum(stream.num_tokens for stream in done)
    span = max(result.duration_s, 1e-12)
    return Report(
        counts=result.counts,
        measures=_measures(done, times),
        num_good=num_good,
        num_tokens=num_tokens,
        duration_s=result.duration_s,
        request_rate=len(done) / span,
        token_rate=num_tokens / span,
        goodput=None if slo is None else num_good / span,
        whys=dict(Counter(f"{stream.status}: {stream.why}" for stream in result.streams if stream.why)),
        kv_bytes=result.kv_bytes,
        busy={machine.name: machine.busy_s / span for machine in result.machines},
        num_preempted=sum(machine.num_preempted for machine in result.machines),
    )


def _measures(done: Sequence[Stream], times: Sequence[RequestTimes]) -> dict[str, Quantiles]:
    measures = {
        "queue": quantiles((one.queue, 1) for one in times),
        "TTFT": quantiles((o.ttft, 1) for o, s in zip(times, done, strict=True) if s.num_tokens),
        "ITL": quantiles(gap for stream in done for gap in gaps_of(stream)),
        "TPOT": quantiles((o.tpot, 1) for o, s in zip(times, done, strict=True) if s.num_tokens > 1),
        "longest stall": quantiles((o.stall, 1) for o, s in zip(times, done, strict=True) if s.num_tokens > 1),
        "handover gap": quantiles((o.gap, 1) for o, s in zip(times, done, strict=True) if o.gap > 0),
        "e2e": quantiles((one.e2e, 1) for one in times),
    }
    return {name: measure for name, measure in measures.items() if measure.num}


def render(report: Report, console: Console | None = None) -> None:
    """Print it as tables."""
    table = Table(title="latencies, ms")
    table.add_column("measure")
    for name in ("p50", "p90", "p99", "worst", "samples"):
        table.add_column(name, justify="right")
    for measure, q in report.measures.items():
        table.add_row(measure, *(f"{1e3 * v:.1f}" for v in (q.p50, q.p90, q.p99, q.worst)), str(q.num))
    ended = ", ".join(f"{count} {what}" for what, count in report.counts.items() if count)
    rates = f"{report.request_rate:.2f} requests/s, {report.token_rate:.1f} tokens/s"
    rates += "" if report.goodput is None else f", goodput {report.goodput:.2f}/s"
    whys = [f"  {times} x {why}" for why, times in report.whys.items()]
    moved = f"{report.kv_bytes / 1e9:.2f} GB of KV moved, {report.num_preempted} preemptions"
    busy = "busy: " + ", ".join(f"{name} {share:.0%}" for name, share in report.busy.items())
    (console or Console()).print(Group(table, ended, *whys, f"{rates} over {report.duration_s:.1f} s", moved, busy))
