"""The report against numbers worked out by hand."""

import pytest
from rich.console import Console

from diptych.bench.client import Record
from diptych.bench.report import by_kind, good, latency, ms, row, summarize, tables
from diptych.bench.slo import Slo


def record(sent: float, times: list[float], kind: str = "chat", error: str = "", late: float = 0.0) -> Record:
    """A request sent at `sent` whose tokens came at `times` and which ended with the last of them."""
    ended = times[-1] if times else sent + 1.0
    return Record(kind, 10, len(times), sent - late, sent, times, ended, len(times), error)


def test_quantiles_interpolate_between_samples() -> None:
    found = latency([4.0, 1.0, 3.0, 2.0])
    assert (found.num, found.mean, found.p50, found.max) == (4, 2.5, 2.5, 4.0)
    assert found.p90 == pytest.approx(3.7)  # 3 + 0.7 * (4 - 3): rank 0.9 * 3 = 2.7


def test_p99_needs_a_thousand_samples() -> None:
    below, enough = latency([float(i) for i in range(999)]), latency([float(i) for i in range(1000)])
    assert below.p95 is not None and below.p99 is None and below.tail == ("p90", below.p90)
    assert latency([1.0] * 199).p95 is None, "and p95 two hundred"
    assert enough.tail[0] == "p99" and enough.p99 == pytest.approx(989.01)


def test_no_samples_are_no_figures() -> None:
    assert latency([]).p50 is None
    empty = summarize([])
    assert (empty.num, empty.num_errors, empty.tokens_per_s, empty.stall_s) == (0, 0, 0.0, None)


def test_a_summary_by_hand() -> None:
    one = record(10.0, [10.5, 10.6, 10.8])
    two = record(11.0, [11.25, 11.75], late=0.125)
    found = summarize([one, two], Slo(ttft=0.4))
    assert found.ttft.p50 == pytest.approx(0.4375) and found.ttft.max == pytest.approx(0.5)  # two: 0.25 and 0.125 late
    assert found.itl.num == 3 and found.itl.mean == pytest.approx(0.8 / 3)  # gaps 0.1, 0.2, 0.5
    assert found.stall_s == found.worst_gaps_s == pytest.approx(0.5)
    assert found.second.num == 2 and found.second.max == pytest.approx(0.5)
    assert found.tpot.mean == pytest.approx((0.15 + 0.5) / 2)
    assert found.e2e.max == pytest.approx(0.875)
    assert found.span_s == pytest.approx(1.75)  # 10.0 to 11.75
    assert found.tokens_per_s == pytest.approx(5 / 1.75)
    assert (found.num_good, found.goodput_per_s) == (1, pytest.approx(1 / 1.75))
    assert found.late_s == pytest.approx(0.125)


def test_the_worst_hundredth_is_a_mean_of_the_longest_gaps() -> None:
    times = [float(i) for i in range(199)]  # 198 gaps of 1 s
    times += [times[-1] + 11.0, times[-1] + 31.0]  # and one of 11 s, one of 20 s: 200 gaps
    found = summarize([record(-1.0, times)])
    assert found.itl.num == 200 and found.stall_s == 20.0
    assert found.worst_gaps_s == pytest.approx(15.5)  # the longest two


def test_tokens_without_an_event_of_their_own_count_and_are_told() -> None:
    seen = record(0.0, [1.0, 2.0])
    seen.num_tokens = 5
    found = summarize([seen])
    assert (found.num_tokens, found.num_unseen) == (5, 3)
    assert found.tpot.p50 == pytest.approx(1.0 / 4)


def test_an_error_is_never_good_and_never_hidden() -> None:
    broken = record(0.0, [0.1, 0.2], error="503: gone")
    silent = record(0.0, [], error="unfinished")
    assert not good(broken, Slo()) and not good(silent, Slo())
    found = summarize([broken, silent, broken])
    assert found.errors == {"503: gone": 2, "unfinished": 1} and found.num_errors == 3
    assert found.num_good == 0 and found.e2e.num == 0
    assert found.itl.num == 2, "what did come was waited for"


def test_kinds_are_told_apart() -> None:
    found = by_kind([record(0.0, [0.1, 0.2]), record(0.0, [3.0, 3.5], "long")])
    assert list(found) == ["chat", "long", "all"]
    assert found["chat"].ttft.p50 == pytest.approx(0.1) and found["long"].ttft.p50 == pytest.approx(3.0)
    assert found["all"].num == 2
    assert list(by_kind([record(0.0, [0.1, 0.2])])) == ["all"], "one kind is no kind"


def test_answers_that_ended_early_are_told() -> None:
    short = record(0.0, [0.1, 0.2])
    short.max_tokens = 9
    assert summarize([short]).num_short == 1


def test_a_request_is_a_line_of_a_file() -> None:
    line = row(record(10.0, [10.5, 10.6, 10.8], late=0.25), 9.0)
    assert (line["due_s"], line["sent_s"], line["num_tokens"]) == (0.75, 1.0, 3)
    assert line["ttft_s"] == pytest.approx(0.75) and line["tpot_s"] == pytest.approx(0.15)
    assert line["itl_s"] == [0.1, 0.2] and line["error"] == ""
    silent = row(record(0.0, [], error="gone"), 0.0)
    assert silent["ttft_s"] is None and silent["tpot_s"] is None and silent["error"] == "gone"


def test_milliseconds_have_three_digits() -> None:
    assert ms(0.00123) == "1.23" and ms(0.0123) == "12.3" and ms(1.23) == "1230" and ms(None) == "-"


def test_the_table_shows_it() -> None:
    console = Console(width=160)
    with console.capture() as capture:
        console.print(tables(by_kind([record(0.0, [0.1, 0.2])], Slo(ttft=1.0)), "a title"))
    shown = capture.get()
    ttft = next(line for line in shown.splitlines() if line.startswith("│ TTFT"))
    assert [cell.strip() for cell in ttft.split("│")[1:-1]] == ["TTFT", "100", "-", "-", "-", "-", "100", "1"]
    for num, expected in ((19, "----"), (20, "5---"), (100, "55--"), (200, "555-"), (1000, "5555")):
        with console.capture() as capture:
            console.print(tables(by_kind([record(float(i), [i + 0.005]) for i in range(num)])))
        ttft = next(line for line in capture.get().splitlines() if line.startswith("│ TTFT"))
        assert "".join(cell.strip()[0] for cell in ttft.split("│")[3:7]) == expected
    assert "in SLO ttft=1: 100.0%, goodput 5.00 requests/s" in shown
