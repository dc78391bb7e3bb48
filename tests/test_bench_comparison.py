"""The table and the sentences, from figures that are known."""

from typing import Any

import pytest

from diptych.bench.client import Record
from diptych.bench.comparison import Found, Round, kept_rounds, show, verdicts
from diptych.bench.processes import Usage
from diptych.bench.report import by_kind

ABOUT: dict[str, Any] = {
    "engine": "paced", "model": "paced", "dtype": "-", "workers": 2, "cores": [0], "cpu": "x", "commit": "y",
    "when": "z", "load": "some", "seconds": 1.0, "num_requests": 1, "seed": 1, "chunk": 256, "slo": "",
}  # fmt: skip


def found(ttft_s: float, gap_s: float, foreign: float = 0.0) -> Round:
    """A round with one chat: its first token after `ttft_s`, its second after another `gap_s`."""
    records = [Record("chat", 10, 2, 0.0, 0.0, [ttft_s, ttft_s + gap_s], ttft_s + gap_s, 2)]
    return Round(by_kind(records), Usage(1.0, {}, foreign, 0.0), [], records)


def rounds_of(ttft_s: float, gap_s: float) -> list[Round]:
    """Three that differ by 2 %."""
    return [found(ttft_s * by, gap_s * by) for by in (0.99, 1.0, 1.01)]


def sentence(base: list[Round], other: list[Round]) -> str:
    lines = list(verdicts({"unified": base, "disaggregated": other}))
    assert len(lines) == 1
    return lines[0]


def test_what_is_gained_and_what_it_costs() -> None:
    said = sentence(rounds_of(0.25, 0.5), rounds_of(0.5, 0.125))
    gained, price = said.split("; the price: ")
    assert gained.startswith("disaggregated against unified: ")
    assert "longest stall 0.250x" in gained and "ITL p90 0.250x" in gained and "TTFT p50 2.00x" in price
    assert "TTFT" not in gained and "stall" not in price


def test_nothing_gained_is_said() -> None:
    same = sentence(rounds_of(0.25, 0.5), rounds_of(0.25, 0.5))
    assert "no difference" in same and "Nothing gained here." in same
    worse = sentence(rounds_of(0.25, 0.5), rounds_of(0.5, 0.5))
    assert "nothing gained here; it costs TTFT p50 2.00x" in worse
    assert "at no price seen here" in sentence(rounds_of(0.25, 0.5), rounds_of(0.25, 0.25))


def test_rounds_that_overlap_are_no_difference() -> None:
    noisy = [found(0.25, gap_s) for gap_s in (0.125, 0.125, 0.51)]  # the median is a quarter, but one round was not
    assert "no difference" in sentence(rounds_of(0.25, 0.5), noisy)


def test_few_rounds_are_said_to_be_few() -> None:
    assert "too few" in list(verdicts({"unified": [found(1, 1)], "chunked": [found(1, 2)]}))[-1]


def test_a_round_with_others_on_the_cores_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    some: Found = {
        "unified": [found(0.1, 0.5), found(0.1, 9.0)],
        "chunked": [found(0.1, 0.125), found(0.1, 8.0, foreign=0.5)],
    }
    assert kept_rounds(some) == [0]
    show(some, ABOUT, markdown=True)
    shown = capsys.readouterr().out
    assert "1 of 2 rounds left out" in shown
    assert "| all: longest stall, ms | 500 | 125 | 0.250 |" in shown


def test_where_no_round_is_left_all_are_shown_with_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    some: Found = {"unified": [found(0.1, 0.5, 0.5)], "chunked": [found(0.1, 0.5, 0.5)]}
    assert kept_rounds(some) == [0]
    show(some, ABOUT, markdown=True)
    assert "do not believe them" in capsys.readouterr().out
