"""The chart: which share took longer, and only where it can be drawn."""

import builtins
from pathlib import Path
from typing import Any

import pytest

from diptych.bench import chart
from diptych.errors import ConfigError


def test_the_share_that_took_as_long() -> None:
    ms, share = chart.exceeding([0.001, 0.004, 0.002, 0.003])
    assert ms == pytest.approx([4.0, 3.0, 2.0, 1.0]) and share == [25.0, 50.0, 75.0, 100.0]
    assert chart.exceeding([]) == ([], [])


def test_many_samples_are_thinned_but_never_the_tail() -> None:
    ms, share = chart.exceeding([float(i) for i in range(1, 100_001)])
    assert len(ms) <= chart.MOST_POINTS and ms[0] == 100_000e3 and ms[-1] == 1e3
    assert ms[:3] == [100_000e3, 99_999e3, 99_998e3] and share == sorted(share) and share[-1] == 100.0


def test_where_it_cannot_be_written_it_is_said_first(monkeypatch: pytest.MonkeyPatch) -> None:
    chart.check(Path("x.png"))
    with pytest.raises(ConfigError, match="png"):
        chart.check(Path("x.txt"))
    found = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return found(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"diptych\[chart\]"):
        chart.check(Path("x.png"))
