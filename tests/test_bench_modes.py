"""What `benchmarks/modes.py` compares: different ways to use the same cores, and what it says of them."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from diptych.bench.client import Record
from diptych.bench.processes import Usage
from diptych.bench.report import by_kind
from diptych.policy.messages import Role

Parse = Callable[..., Any]
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "modes.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("modes", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def parse(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Parse:
    def parsed(*flags: str) -> Any:
        monkeypatch.setattr(sys, "argv", ["modes.py", *flags])
        return script._parse()

    return parsed


def test_every_mode_has_two_workers_on_the_same_cores(script: ModuleType, parse: Parse) -> None:
    arguments = parse("--engine", "torch", "--cores", "0,1")
    for mode in script.MODES:
        workers = script._cluster(mode, arguments).workers
        assert [worker.cores for worker in workers] == [(0,), (1,)], mode


def test_the_modes_are_what_they_are_called(script: ModuleType, parse: Parse) -> None:
    arguments = parse("--engine", "paced", "--chunk", "256")
    unified, chunked, disaggregated, budgeted = (script._cluster(mode, arguments).workers for mode in script.MODES)
    assert {(w.role, w.chunk) for w in unified} == {(Role.MIXED, None)}
    assert {(w.role, w.chunk) for w in chunked} == {(Role.MIXED, 256)}
    assert [w.role for w in disaggregated] == [Role.PREFILL, Role.DECODE]
    assert {(w.role, w.itl_budget_s) for w in budgeted} == {(Role.MIXED, script.ITL_BUDGET_S)}


def test_an_unknown_mode_is_refused(parse: Parse) -> None:
    with pytest.raises(SystemExit):
        parse("--modes", "unified,magic")


def test_a_round_with_others_on_the_cores_is_left_out(
    script: ModuleType,
    parse: Parse,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def found(gap_s: float, foreign: float) -> object:
        records = [Record("chat", 10, 2, 0.0, 0.0, [0.5, 0.5 + gap_s], 0.5 + gap_s, 2)]
        return script.Round(by_kind(records), Usage(1.0, {}, foreign, 0.0), [])

    arguments = parse("--modes", "unified,chunked", "--engine", "paced")
    cluster = script._cluster("unified", arguments)
    about = script._about(arguments, cluster, script._mix(arguments), [])
    results = {"unified": [found(0.5, 0.0), found(9.0, 0.0)], "chunked": [found(0.125, 0.0), found(8.0, 0.5)]}
    script._show(results, about, markdown=True)
    shown = capsys.readouterr().out
    assert "1 of 2 rounds had other processes" in shown and "left out" in shown
    assert "| chat: longest stall, ms | 500 | 125 | 0.250 |" in shown
