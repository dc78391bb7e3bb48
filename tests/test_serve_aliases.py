"""vLLM's names: the same numbers as under ours, with the labels that dashboards select by."""

from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from diptych.serve.metrics import Metrics, Timer
from diptych.serve.telemetry import Telemetry

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
    metrics.longest_answers.observe(4)
    Timer(metrics, 0.0, 7).end("cancelled")
    Timer(metrics, 0.0, 7).end("rejected")
    return scrape(metrics)


@pytest.mark.parametrize(
    "name",
    [
        "time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds",
        "request_decode_time_seconds", "request_max_num_generation_tokens",
    ],
)  # fmt: skip
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


def test_an_older_name_is_there_too(seen: Any) -> None:
    assert seen["vllm:time_per_output_token_seconds_count"] == seen["vllm:inter_token_latency_seconds_count"]
    assert seen["vllm:request_decode_time_seconds_count"][0][1] == 1


def test_what_the_router_measures_is_named_there_once() -> None:
    telemetry = Telemetry()
    telemetry.alias("tiny")
    telemetry.prefilled(0.25, 0.5)
    text = Metrics("tiny").expose(ROWS, telemetry.expose()).decode()
    found = {s.name: s for family in text_string_to_metric_families(text) for s in family.samples}
    for name, value in (("queue", 0.25), ("prefill", 0.5)):
        sample = found[f"vllm:request_{name}_time_seconds_sum"]
        assert (sample.labels, sample.value) == ({"model_name": "tiny", "engine": "0"}, value)
    heads = [line for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(heads) == len(set(heads)), "no family twice"
