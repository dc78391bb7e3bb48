"""What the times of many requests come to: latencies, stalls, throughput, goodput; as JSON and as tables.

TTFT: sent to first token. ITL: gap between two tokens of one answer as they came. Second: the gap between token 1 and
token 2, where a handover shows. TPOT: an answer's mean gap. A quantile is shown only where there are samples for it:
p95 and p99 from 1,000 on, below that p90 is the last. Not responsible for comparing servers (`rounds.py`).
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise

import msgspec
import numpy as np
from rich.table import Table

from diptych.bench.client import Record
from diptych.bench.slo import Slo

ENOUGH_FOR_P99 = 1000
WORST_SHARE = 0.01


class Latency(msgspec.Struct, frozen=True):
    """A distribution, in seconds. Quantiles interpolate linearly between samples."""

    num: int = 0
    mean: float | None = None
    p50: float | None = None
    p90: float | None = None
    p95: float | None = None
    p99: float | None = None
    max: float | None = None

    @property
    def tail(self) -> tuple[str, float | None]:
        """The highest quantile there are samples for, and its name."""
        return ("p99", self.p99) if self.p99 is not None else ("p90", self.p90)


class Summary(msgspec.Struct, frozen=True):
    """All there is to say of a set of requests. `stall_s`: the longest gap between two tokens of a running answer."""

    num: int
    num_good: int  # finished without error and inside the SLO
    errors: dict[str, int]
    num_prompt_tokens: int
    num_tokens: int
    num_unseen: int  # tokens that made no event of their own: their gaps are hidden in the next one's
    span_s: float
    tokens_per_s: float
    requests_per_s: float
    goodput_per_s: float
    slo: str
    ttft: Latency
    itl: Latency
    second: Latency
    tpot: Latency
    e2e: Latency
    stall_s: float | None
    worst_gaps_s: float | None  # mean of the longest 1 % of gaps
    late_s: float | None  # the longest a request was sent after its time: the load generator's own fault

    @property
    def num_errors(self) -> int:
        """Requests that did not end as they should."""
        return sum(self.errors.values())


def latency(samples: Sequence[float]) -> Latency:
    """The distribution of some samples."""
    if not samples:
        return Latency()
    p50, p90, p95, p99 = (float(q) for q in np.percentile(samples, (50, 90, 95, 99)))
    enough = len(samples) >= ENOUGH_FOR_P99
    return Latency(
        len(samples), float(np.mean(samples)), p50, p90, p95 if enough else None, p99 if enough else None, max(samples)
    )


def gaps(record: Record) -> list[float]:
    """The gaps between the tokens of one answer."""
    return [later - earlier for earlier, later in pairwise(record.times_s)]


def ttft(record: Record) -> float:
    """Sent to first token."""
    return record.times_s[0] - record.sent_s


def tpot(record: Record) -> float:
    """The mean gap of an answer; 0 where it has only one token."""
    times = record.times_s
    return (times[-1] - times[0]) / max(max(record.num_tokens, len(times)) - 1, 1)


def good(record: Record, slo: Slo) -> bool:
    """It finished, and inside the limits."""
    if record.error or not record.times_s:
        return False
    return slo.met(ttft(record), tpot(record), max(gaps(record), default=0.0), record.ended_s - record.sent_s)


def summarize(records: Iterable[Record], slo: Slo | None = None) -> Summary:
    """The summary of some requests, over the span from the first sent to the last ended."""
    records, slo = list(records), slo or Slo()
    begun = [record for record in records if record.times_s]
    ended = [record for record in records if not record.error]
    span_s = max((r.ended_s for r in records), default=0.0) - min((r.sent_s for r in records), default=0.0)
    all_gaps = [gap for record in begun for gap in gaps(record)]
    worst = sorted(all_gaps)[-max(round(len(all_gaps) * WORST_SHARE), 1) :]
    num_good = sum(good(record, slo) for record in records)
    num_tokens = sum(max(record.num_tokens, len(record.times_s)) for record in records)

    def rate(num: int) -> float:
        return num / span_s if span_s > 0 else 0.0

    return Summary(
        num=len(records),
        num_good=num_good,
        errors=dict(Counter(record.error for record in records if record.error)),
        num_prompt_tokens=sum(record.num_prompt for record in records),
        num_tokens=num_tokens,
        num_unseen=sum(record.num_unseen for record in ended),
        span_s=span_s,
        tokens_per_s=rate(num_tokens),
        requests_per_s=rate(len(ended)),
        goodput_per_s=rate(num_good),
        slo=str(slo),
        ttft=latency([ttft(record) for record in begun]),
        itl=latency(all_gaps),
        second=latency([gaps(record)[0] for record in begun if len(record.times_s) > 1]),
        tpot=latency([tpot(record) for record in ended if len(record.times_s) > 1]),
        e2e=latency([record.ended_s - record.sent_s for record in ended]),
        stall_s=max(all_gaps, default=None),
        worst_gaps_s=sum(worst) / len(worst) if worst else None,
        late_s=max((record.sent_s - record.due_s for record in records), default=None),
    )


def by_kind(records: Iterable[Record], slo: Slo | None = None) -> dict[str, Summary]:
    """A summary of each kind of request, in order of appearance, and of "all" of them."""
    kinds: dict[str, list[Record]] = {}
    records = list(records)
    for record in records:
        kinds.setdefault(record.kind, []).append(record)
    return {kind: summarize(some, slo) for kind, some in (*kinds.items(), ("all", records))}


# --- tables ----------------------------------------------------------------------------------------------------


def ms(seconds: float | None) -> str:
    """Milliseconds with three significant digits."""
    if seconds is None:
        return "-"
    value = seconds * 1e3
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def table(summaries: dict[str, Summary], title: str = "") -> Table:
    """A table for people, in milliseconds."""
    shown = Table("", *summaries, title=title, title_justify="left")
    columns = list(summaries.values())
    shown.add_row("requests, errors", *(f"{s.num}, {s.num_errors}" for s in columns))
    for name in ("ttft", "second", "itl", "tpot", "e2e"):
        shown.add_row(f"{name.upper()} ms: p50 … max", *(_spread(getattr(s, name)) for s in columns))
    shown.add_row("longest stall, worst 1 % ms", *(f"{ms(s.stall_s)}, {ms(s.worst_gaps_s)}" for s in columns))
    shown.add_row("answer tokens/s", *(f"{s.tokens_per_s:.0f}" for s in columns))
    if any(s.slo for s in columns):
        name = f"in SLO {columns[0].slo}"
        shown.add_row(name, *(f"{s.num_good / max(s.num, 1):.1%}, {s.goodput_per_s:.2f}/s" for s in columns))
    return shown


def _spread(found: Latency) -> str:
    named = {"p50": found.p50, "p90": found.p90, "p95": found.p95, "p99": found.p99, "max": found.max}
    return "  ".join(f"{name} {ms(value)}" for name, value in named.items() if value is not None) or "-"
