"""The soak in short, on real paced processes: every block comes home; and its verdicts can be bad ones."""

import asyncio
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console
from rich.live import Live

from diptych.bench.client import Record
from diptych.bench.processes import Footprint
from diptych.config import load_cluster

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "soak.py"
FAST = {"base_ms": 1.0, "new_token_us": 5.0, "context_token_us": 0.0, "kv_bytes_per_token": 64, "vocab": 64}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("soak", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_a_few_seconds_of_it(script: ModuleType) -> None:
    flags = {"engine": "paced", "prefill": 1, "decode": 1, "paced": FAST, "kv_memory": "512KiB"}
    console = Console(file=open("/dev/null", "w"))  # noqa: SIM115
    with script.brought_up(load_cluster(None, flags)) as soak, Live(console=console, auto_refresh=False) as live:
        crowd = script.Crowd(Random(1), 64)
        tally, last = asyncio.run(script.run(soak, crowd, 40.0, 0.08, 1.0, live))
    console.file.close()
    assert script.faults(soak, tally, last) == []
    assert tally.num_open == 0 and min(tally.ended[how] for how in ("answered", "left", "refused")) > 3
    assert set(last.processes) == {"router", "api", "p0", "d0", "client"}
    assert all(held.rss_bytes >= held.anon_bytes > 0 and held.pss_bytes > 0 for held in last.processes.values())
    assert last.workers[0]["steps"] > soak.samples[0].workers[0]["steps"] + 50, "somebody was served"


# --- what it would say -------------------------------------------------------------------------------------------


def footprint(rss_mib: float, num_fds: int = 9) -> Footprint:
    rss = int(rss_mib * (1 << 20))
    return Footprint(rss, rss, rss, 0, num_fds, 1)


def row(**blocks: int) -> dict[str, Any]:
    counts = dict.fromkeys(("free", "held", "reserved", "offered", "cached", "quarantined"), 0) | blocks
    return {"id": "m0", "pid": 1, "requests": 0, "balanced": True, "blocks": counts}


def soaked(script: ModuleType, sizes_mib: list[float]) -> Any:
    """A soak with one process of those sizes, a minute apart."""
    soak = script.Soak(0, {"m0": 1})
    soak.samples = [script.Sample(60.0 * i, {"m0": footprint(s)}, [row(free=8)]) for i, s in enumerate(sizes_mib)]
    return soak


def test_memory_that_grows_is_found(script: ModuleType) -> None:
    warmed = [10.0] * 10 + [50.0] * 40  # a step in the warm-up is none of its business
    assert script.growing(soaked(script, warmed)) == []
    slowly = [50.0 + 0.1 * i for i in range(60)]  # 6 MiB an hour
    assert script.growing(soaked(script, slowly)) == ["m0: grows 6.00 MiB an hour"]
    large = [500.0 + 0.04 * i for i in range(60)]  # 1.4 MiB in all, of a process of 500
    assert script.growing(soaked(script, large)) == []
    assert script.growing(soaked(script, slowly[:9])) == [], "too short to say"
    jumps = [50.0 + (30.0 if i in (20, 40) else 0.0) for i in range(60)]
    assert script.growing(soaked(script, jumps)) == [], "two samples that stick out are no slope"


def test_what_did_not_come_home_is_found(script: ModuleType) -> None:
    def said(last: Any, tally: Any = None) -> list[str]:
        soak = soaked(script, [1.0, 1.0])
        found: list[str] = script.faults(soak, tally or script.Tally(), last)
        return found

    good = script.Sample(120.0, {"m0": footprint(1)}, [row(free=3, cached=5)])
    assert said(good) == []
    assert "did not come home" in said(replace(good, workers=[row(free=7, held=1)]))[0]
    assert "do not add up" in said(replace(good, workers=[row(free=7)]))[0]
    assert "started again" in said(replace(good, workers=[row(free=8) | {"pid": 2}]))[0]
    assert said(replace(good, processes={"m0": footprint(1, num_fds=11)})) == ["m0: 2 files stayed open"]


def test_what_ended_otherwise_than_it_should_is_found(script: ModuleType) -> None:
    def noted(error: str, **how: Any) -> Any:
        tally = script.Tally()
        tally.note(script.Act("some", b"", **how), Record(error=error))
        return tally

    assert noted("").ended == {"answered": 1} and not noted("").unexpected
    assert noted("500: oh").unexpected == {"some: 500: oh": 1}
    assert noted("unfinished", leaves_after_s=0.1).ended == {"left": 1}
    assert noted("400: no", refused=True).ended == {"refused": 1}
    assert noted("", refused=True).unexpected == {"some: was not refused": 1}
