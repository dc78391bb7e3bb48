"""What `benchmarks/policy_cost.py` is to show, held on every run: messages do not grow with the context."""

import importlib.util
import sys
from pathlib import Path
from statistics import median
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "policy_cost.py"
SHORT, LONG = 1024, 32 * 1024
GROWS = 1.5  # numbers such as block ids and positions take more bytes as they grow, up to this much in all


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("policy_cost", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def sizes(script: ModuleType, scene: str, context: int, batch: int) -> dict[str, float]:
    """Median bytes of each kind of message that is sent more than once per request."""
    tally = script.Tally()
    getattr(script, scene)(context, batch, tally)
    return {name: median(found) for name, found in tally.num_bytes.items() if script.ONCE not in name}


@pytest.mark.parametrize(("scene", "batch"), [("mixed_worker", 1), ("mixed_worker", 4), ("pair", 1), ("pair", 4)])
def test_messages_are_of_one_size_whatever_the_context(script: ModuleType, scene: str, batch: int) -> None:
    short, long = (sizes(script, scene, context, batch) for context in (SHORT, LONG))
    assert {"Run decode", "StepDone decode", "StepDone prefill", "Emit"} <= set(short)
    for name in short:
        # A short prompt's chunks are few and may be its last, smaller ones: compare where both are whole.
        assert long[name] <= GROWS * short[name] or name in ("Publish", "Pull"), name
    if scene == "pair":
        most = 16 * script.CHUNK // script.BLOCK  # bytes: two ids of up to five, for each block of a chunk
        assert long["Publish"] < most and long["Pull"] < most


def test_every_router_event_is_timed(script: ModuleType) -> None:
    tally = script.Tally()
    script.router(SHORT, tally)
    assert {len(found) for found in tally.us.values()} == {script.NUM_ROUTED, 2 * script.NUM_ROUTED}
    assert all(us > 0 for found in tally.us.values() for us in found)
