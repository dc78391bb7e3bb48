"""What a report says of streams whose times are known."""

from dataclasses import dataclass
from io import StringIO
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from diptych.sim.agenda import instant
from diptych.sim.driver import MachineStats, SimResult
from diptych.sim.report import gaps_of, quantiles, render, summarize, times_of
from diptych.sim.streams import Stream, Stretch
from diptych.sim.workload import Arrival


@dataclass(frozen=True)
class Limits:
    ttft: float = inf
    tpot: float = inf

    def met(self, ttft: float, tpot: float, itl: float, e2e: float) -> bool:
        return ttft <= self.ttft and tpot <= self.tpot


def stream(*times: float, paired: bool = False) -> Stream:
    """A finished request that arrived at 0 and got its tokens at those times."""
    made = Stream(0, Arrival(0.0, 1, len(times), len(times)), status="finished", paired=paired)
    made.started(instant(times[0] / 2))
    before = 0.0
    for i, time in enumerate(times):
        made.append(i, Stretch(1, instant(before), instant(time) - instant(before), 0))
        before = time
    return made


def result(*streams: Stream) -> SimResult:
    return SimResult(streams, (MachineStats("m", "mixed", 5.0, 9, 1),), {"finished": len(streams)}, 10.0, 1, 0)


def test_a_request_is_measured_by_its_tokens() -> None:
    times = times_of(stream(1.0, 1.5, 1.6, 1.7, paired=True))
    assert times.queue == pytest.approx(0.5) and times.ttft == pytest.approx(1.0) and times.e2e == pytest.approx(1.7)
    assert times.tpot == pytest.approx(0.7 / 3) and times.stall == pytest.approx(0.5)
    assert times.gap == pytest.approx(0.5) and times_of(stream(1.0, 1.5)).gap == 0


def test_a_request_that_writes_nothing_counts_in_queue_and_e2e_alone() -> None:
    silent = Stream(1, Arrival(1.0, 1, 0, 0), status="finished", ended=instant(3.0))
    silent.started(instant(1.5))
    report = summarize(result(stream(1.0, 1.5), silent), Limits(ttft=2.0))
    assert {name: m.num for name, m in report.measures.items()} == {
        "queue": 2, "TTFT": 1, "ITL": 1, "TPOT": 1, "longest stall": 1, "e2e": 2,
    }  # fmt: skip
    assert times_of(silent).e2e == times_of(silent).ttft == pytest.approx(2.0) and report.num_good == 2


def test_goodput_counts_who_met_the_objective() -> None:
    report = summarize(result(stream(1.0, 1.1), stream(3.0, 3.1), stream(1.0, 2.0)), Limits(ttft=2.0, tpot=0.5))
    assert report.num_good == 1 and report.goodput == pytest.approx(0.1) and report.request_rate == pytest.approx(0.3)
    assert report.busy == {"m": 0.5}


def test_only_finished_requests_have_latencies() -> None:
    cancelled = stream(1.0, 9.0)
    cancelled.status = "cancelled"
    assert summarize(result(stream(1.0, 1.1), cancelled)).measures["TTFT"].num == 1
    assert summarize(result()).measures == {}


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 5)), min_size=1, max_size=20))
def test_quantiles_are_those_of_the_unfolded_list(samples: list[tuple[int, int]]) -> None:
    unfolded = sorted(value for value, weight in samples for _ in range(weight))
    found = quantiles((float(value), weight) for value, weight in samples)
    for q, value in ((0.5, found.p50), (0.9, found.p90), (0.99, found.p99)):
        assert sum(v <= value for v in unfolded) >= q * len(unfolded) - 1e-9
        assert sum(v < value for v in unfolded) < q * len(unfolded)
    assert found.worst == unfolded[-1] and found.num == len(unfolded)


@given(st.integers(1, 200), st.integers(10**12, 10**14), st.integers(0, 10**12), st.integers(1, 100))
def test_gaps_of_a_stretch_add_up_and_keep_the_first_and_the_largest(
    num: int, first: int, growth: int, more: int
) -> None:
    made = Stream(0, Arrival(0.0, 1, num + more, num + more))
    made.append(0, Stretch(num, 0, first, growth))
    made.append(num, Stretch(more, made.stretches[0].token(num - 1) + 5, first * 2, growth))
    times = list(made.times())
    exact = [after - before for before, after in zip(times, times[1:], strict=False)]
    gaps = gaps_of(made)
    assert sum(weight for _, weight in gaps) == len(exact)
    assert sum(gap * weight for gap, weight in gaps) == pytest.approx(sum(exact), abs=1e-9)
    assert gaps[0][0] == pytest.approx(exact[0]) and max(gap for gap, _ in gaps) == pytest.approx(max(exact))


def test_stretches_that_go_on_are_one() -> None:
    made = Stream(0, Arrival(0.0, 1, 5, 5))
    made.append(0, Stretch(2, 0, 10, 1))
    made.append(2, Stretch(3, 21, 12, 1))
    assert made.stretches == [Stretch(5, 0, 10, 1)]
    with pytest.raises(ValueError, match="hears token 4"):
        made.append(4, Stretch(1, 99, 1, 0))


@given(st.integers(1, 20), st.integers(1, 100), st.integers(0, 9), st.data())
def test_a_part_of_a_stretch_has_the_same_times(num: int, first: int, growth: int, data: st.DataObject) -> None:
    whole = Stretch(num, 7, first, growth)
    begin = data.draw(st.integers(0, num - 1))
    end = data.draw(st.integers(begin + 1, num))
    part = whole.part(begin, end)
    assert [part.token(i) for i in range(part.num)] == [whole.token(i) for i in range(begin, end)]
    when = data.draw(st.integers(0, whole.token(num - 1) + 2))
    assert whole.num_before(when) == sum(whole.token(i) < when for i in range(num))


def test_it_can_be_shown() -> None:
    out = StringIO()
    render(summarize(result(stream(1.0, 1.5, paired=True))), Console(file=out, width=100))
    assert "handover gap" in out.getvalue() and "m 50%" in out.getvalue() and "500.0" in out.getvalue()


def test_it_says_why_requests_were_turned_away_and_of_goodput_only_what_was_asked() -> None:
    away = [stream(1.0) for _ in range(2)]
    for one in away:
        one.status, one.why = "rejected", "no room"
    for slo, shown in ((None, False), (Limits(ttft=1.0), True)):
        out = StringIO()
        render(summarize(result(stream(1.0, 1.5), *away), slo), Console(file=out, width=100))
        assert "2 x rejected: no room" in out.getvalue() and ("goodput" in out.getvalue()) == shown
