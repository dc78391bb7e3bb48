"""What `diptych compare` compares: the same workers and cores in every mode; and all of it once, on a small scale."""

import argparse
import json
from pathlib import Path

import pytest

from diptych import cli
from diptych.bench.compare import ITL_BUDGET_S, MODES, cluster_of, gentle
from diptych.policy.messages import Role
from diptych.sim.load import Load

TRACE = Path(__file__).parent / "traces" / "mooncake.jsonl"


def called(*flags: str) -> argparse.Namespace:
    return cli._parser().parse_args(["compare", *flags])


def test_every_mode_has_the_same_workers_on_the_same_cores() -> None:
    for mode in MODES:
        workers = cluster_of(mode, called("--cores", "0,1")).workers
        assert [worker.cores for worker in workers] == [(0,), (1,)], mode


def test_the_modes_are_what_they_are_called() -> None:
    arguments = called("--chunk", "128", "--workers", "3")
    unified, chunked, disaggregated, budgeted = (cluster_of(mode, arguments).workers for mode in MODES)
    assert {cluster_of(mode, arguments).log_level for mode in MODES} == {"warning"}, "their lines are not the figures"
    assert {(w.role, w.chunk) for w in unified} == {(Role.MIXED, None)}
    assert {(w.role, w.chunk) for w in chunked} == {(Role.MIXED, 128)}
    assert [w.role for w in disaggregated] == [Role.PREFILL, Role.DECODE, Role.DECODE]
    assert {(w.role, w.itl_budget_s) for w in budgeted} == {(Role.MIXED, ITL_BUDGET_S)}
    two = cluster_of("disaggregated", called("--workers", "3", "--prefill", "2")).workers
    assert [w.role for w in two] == [Role.PREFILL, Role.PREFILL, Role.DECODE]


def test_the_warm_up_has_every_kind_and_is_short() -> None:
    load = Load(rate=8.0, long_every_s=10.0, seconds=60.0)
    assert {arrival.kind for arrival in gentle(load).arrivals()} == {"chat", "long"}
    assert max(arrival.time_s for arrival in gentle(load).arrivals()) < 3.0
    assert len(list(gentle(Load(trace=TRACE)).arrivals())) == 4


@pytest.mark.parametrize(
    "flags",
    [
        ["--modes", "unified,magic"],
        ["--modes", "unified,unified"],
        ["--workers", "1"],
        ["--prefill", "2"],
        ["--rounds", "0"],
        ["--chart", "chart.txt"],
        ["--engine", "paced", "--slo", "good"],
    ],
)
def test_what_cannot_be_compared_is_said(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", *flags]) == 2
    assert capsys.readouterr().err.startswith("diptych: ")


def test_all_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["--seconds", "0.5", "--rate", "10", "--long-every", "0", "--rounds", "1", "--output", "4"]
    files = ["--out", str(tmp_path / "out.json"), "--chart", str(tmp_path / "chart.svg")]
    assert cli.main(["compare", "--engine", "paced", "--modes", "unified,disaggregated", *short, *files]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert list(found["rounds"]) == ["unified", "disaggregated"]
    assert found["rounds"]["unified"][0]["kinds"]["all"]["errors"] == {}
    assert sum(row["kv"]["transfers"] for row in found["rounds"]["disaggregated"][0]["workers"]) > 0
    assert "disaggregated against unified: " in capsys.readouterr().out
    assert "disaggregated" in (tmp_path / "chart.svg").read_text()
