"""Interleaving, spreads and tables."""

import json
from pathlib import Path

import pytest

from diptych.bench.rounds import Spread, environment, interleaved, number, print_table, ratios, spread, write_json


def test_rounds_take_turns() -> None:
    assert list(interleaved("AB", 2)) == [(0, "A"), (0, "B"), (1, "A"), (1, "B")]


def test_a_spread_is_median_least_and_most() -> None:
    assert spread([3.0, 1.0, None, 2.0]) == Spread(2.0, 1.0, 3.0)
    assert spread([None]) is None
    assert Spread(2.0, 1.0, 3.0).show() == "2.00 (1.00–3.00)"
    assert Spread(2.0, 2.0, 2.0).show() == "2.00"


def test_ratios_are_taken_round_by_round() -> None:
    # Both things were twice as slow in round two: the ratio does not see it.
    assert ratios([2.0, 4.0], [1.0, 2.0]) == Spread(2.0, 2.0, 2.0)
    assert ratios([2.0, None, 1.0], [1.0, 1.0, 0.0]) == Spread(2.0, 2.0, 2.0)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (0.0456, "0.046"), (1.234, "1.23"), (12.34, "12.3"), (123.4, "123"), (12345.6, "12346")],
)
def test_numbers_have_three_digits(value: float, shown: str) -> None:
    assert number(value) == shown


def test_a_markdown_table_can_be_pasted(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["", "a"], [["x", "1"], ["y", "2"]], "title", markdown=True)
    assert capsys.readouterr().out == "\n|  | a |\n|---|---|\n| x | 1 |\n| y | 2 |\n\n"


def test_what_a_figure_needs_beside_it() -> None:
    found = environment([0, 3])
    assert found["cores"] == [0, 3]
    assert all(found[key] for key in ("commit", "when", "cpu", "python"))


def test_json_is_kept(tmp_path: Path) -> None:
    write_json(tmp_path / "new" / "out.json", {"a": [Spread(1.0, 1.0, 1.0)]})
    assert json.loads((tmp_path / "new" / "out.json").read_text()) == {"a": [{"median": 1.0, "low": 1.0, "high": 1.0}]}
