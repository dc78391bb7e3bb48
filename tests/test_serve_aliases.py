"""vLLM's names: the same numbers as under ours, with the labels that dashboards select by."""

from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from diptych.serve.metrics import Metrics, Timer

ROWS: list[dict[str, Any]] = [
    {"id": "d0", "running": 3, "waiting": 1, "blocks": {"free": 4, "held": 2, "reserved": 1, "cached": 1}},
    {"id": "p0", "state": "silent"},
]


def scrape(metrics: Metrics) -> dict[str, list[tuple[dict[str, str], float]]]:
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(metrics.expose(ROWS).decode()):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


@pytest.fixture
def seen() -> dict[str, list[tuple[dict[str, str], float]]]:
    metrics = Metrics("tiny")
    timer = Timer(metrics, arrived=0.0, num_prompt=7)
    timer.tokens(1)
    timer.tokens(3)
    timer.end("length")
    Timer(metrics, 0.0, 7).end("cancelled")
    Timer(metrics, 0.0, 7).end("rejected")
    return scrape(metrics)


@pytest.mark.parametrize(
    "name", ["time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds"]
)
@pytest.mark.parametrize("end", ["bucket", "sum", "count"])
def test_histograms_are_the_same(seen: Any, name: str, end: str) -> None:
    ours, theirs = seen[f"diptych_{name}_{end}"], seen[f"vllm:{name}_{end}"]
    labels = {"model_name": "tiny", "engine": "0"}
    assert [(own | labels, value) for own, value in ours] == theirs
    assert any(value > 0 for _, value in theirs)


@pytest.mark.parametrize(("name", "value"), [("prompt_tokens_total", 7), ("generation_tokens_total", 4)])
def test_counters_are_the_same(seen: Any, name: str, value: float) -> None:
    assert seen[f"vllm:{name}"] == [({"model_name": "tiny", "engine": "0"}, value)]
    assert seen[f"diptych_{name}"] == [({}, value)]


def test_reasons_have_vllms_names(seen: Any) -> None:
    found = {labels["finished_reason"]: value for labels, value in seen["vllm:request_success_total"]}
    assert found == {"stop": 0, "length": 1, "abort": 1, "error": 0}


def test_workers_are_engines(seen: Any) -> None:
    d0 = {"model_name": "tiny", "engine": "d0"}
    assert seen["vllm:num_requests_running"] == [(d0, 3)]
    assert seen["vllm:num_requests_waiting"] == [(d0, 1)]
    assert seen["vllm:kv_cache_usage_perc"] == [(d0, 3 / 8)]
