"""What the times of many requests come to: latencies, stalls, throughput, goodput; as JSON and as tables.

TTFT: from when the request should have been sent to its first token, so that a client that lags hides nothing. ITL:
gap between two tokens of one answer as they came. Second: the gap between token 1 and token 2, where a handover shows.
TPOT: an answer's mean gap. A quantile is shown only where ten samples lie beyond it: p50 from 20 on, p90 from 100, p95
from 200, p99 from 1,000.
Not responsible for comparing servers (`rounds.py`).
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
from rich.console import Group
from rich.table import Table

from diptych.bench.client import Record
from diptych.bench.slo import Slo

ENOUGH = {"p50": 20, "p90": 100, "p95": 200, "p99": 1000}  # samples, of which ten lie beyond
WORST_SHARE = 0.01


class Latency(msgspec.Struct, frozen=True):
    """A distribution, in seconds. Quantiles interpolate linearly; p95 and p99 where there are enough samples."""

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
    num_short: int  # answers that ended before their length, where that is no error
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
    num = len(samples)
    tail = p95 if num >= ENOUGH["p95"] else None, p99 if num >= ENOUGH["p99"] else None
    return Latency(num, float(np.mean(samples)), p50, p90, *tail, max(samples))


def gaps(record: Record) -> list[float]:
    """The gaps between the tokens of one answer."""
    return [later - earlier for earlier, later in pairwise(record.times_s)]


def ttft(record: Record) -> float:
    """From when it should have been sent to its first token."""
    return record.times_s[0] - record.due_s


def tpot(record: Record) -> float:
    """The mean gap of an answer; 0 where it has only one token."""
    times = record.times_s
    return (times[-1] - times[0]) / max(max(record.num_tokens, len(times)) - 1, 1)


def e2e(record: Record) -> float:
    """From when it should have been sent to its end."""
    return record.ended_s - record.due_s


def good(record: Record, slo: Slo) -> bool:
    """It finished, and inside the limits."""
    if record.error or not record.times_s:
        return False
    return slo.met(ttft(record), tpot(record), max(gaps(record), default=0.0), e2e(record))


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
        num_short=sum(record.num_tokens < record.max_tokens for record in ended),
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
        e2e=latency([e2e(record) for record in ended]),
        stall_s=max(all_gaps, default=None),
        worst_gaps_s=sum(worst) / len(worst) if worst else None,
        late_s=max((record.sent_s - record.due_s for record in records), default=None),
    )


def by_kind(records: Iterable[Record], slo: Slo | None = None) -> dict[str, Summary]:
    """A summary of each kind of request where there are several, in order of appearance, and of "all" of them."""
    kinds: dict[str, list[Record]] = {}
    records = list(records)
    for record in records:
        kinds.setdefault(record.kind, []).append(record)
    if len(kinds) == 1:
        kinds = {}
    return {kind: summarize(some, slo) for kind, some in (*kinds.items(), ("all", records))}


def row(record: Record, start_s: float) -> dict[str, Any]:
    """One request as a line of a file: its times in seconds, `due_s` and `sent_s` since `start_s`."""
    seen = record.times_s
    return {
        "kind": record.kind,
        "due_s": record.due_s - start_s,
        "sent_s": record.sent_s - start_s,
        "num_prompt": record.num_prompt,
        "max_tokens": record.max_tokens,
        "num_tokens": record.num_tokens,
        "ttft_s": ttft(record) if seen else None,
        "tpot_s": tpot(record) if len(seen) > 1 else None,
        "e2e_s": e2e(record),
        "itl_s": [round(gap, 6) for gap in gaps(record)],
        "error": record.error,
    }


# --- tables ----------------------------------------------------------------------------------------------------


def ms(seconds: float | None) -> str:
    """Milliseconds with three significant digits."""
    if seconds is None:
        return "-"
    value = seconds * 1e3
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def tables(summaries: dict[str, Summary], title: str = "") -> Group:
    """For people: latencies in milliseconds, then what else there is to say."""
    shown = Table("ms", *COLUMNS, "samples", title=title, title_justify="left")
    for column in shown.columns[1:]:
        column.justify = "right"
    for kind, summary in summaries.items():
        prefix = f"{kind}: " if len(summaries) > 1 else ""
        for name in ("ttft", "second", "itl", "tpot", "e2e"):
            found: Latency = getattr(summary, name)
            cells = (ms(getattr(found, column) if found.num >= ENOUGH.get(column, 1) else None) for column in COLUMNS)
            shown.add_row(f"{prefix}{NAMES[name]}", *cells, str(found.num), end_section=name == "e2e")
    return Group(shown, *(line for kind, summary in summaries.items() for line in _lines(kind, summary)))


def _lines(kind: str, summary: Summary) -> Iterator[str]:
    """A summary in words."""
    span = f"{summary.num} requests, {summary.num_errors} errors in {summary.span_s:.1f} s"
    rates = f"{summary.requests_per_s:.2f} requests/s, {summary.tokens_per_s:.0f} answer tokens/s"
    stalls = f"longest stall {ms(summary.stall_s)} ms, worst 1 % of gaps {ms(summary.worst_gaps_s)} ms"
    yield f"{kind}: {span}; {rates}; {stalls}"
    if summary.slo:
        share = summary.num_good / max(summary.num, 1)
        yield f"  in SLO {summary.slo}: {share:.1%}, goodput {summary.goodput_per_s:.2f} requests/s"
    if summary.num_short:
        yield f"  {summary.num_short} answers ended before the length that was asked for"


COLUMNS = ("mean", "p50", "p90", "p95", "p99", "max")
NAMES = {"ttft": "TTFT", "second": "token 1 to 2", "itl": "ITL", "tpot": "TPOT", "e2e": "e2e"}
