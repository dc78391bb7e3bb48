"""Metrics: what a request and a row of a worker become in a scrape."""

import itertools
import random
from time import perf_counter
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from diptych.serve.metrics import Metrics, Timer
from diptych.serve.telemetry import Telemetry

ROW: dict[str, Any] = {
    "id": "d0",
    "role": "decode",
    "state": "up",
    "running": 3,
    "waiting": 1,
    "blocks": {"free": 5, "held": 2},
    "leases": {"offered": 0, "expected": 2, "kept": 1},
}


def scrape(metrics: Metrics, *rows: dict[str, Any]) -> dict[tuple[str, ...], float]:
    order = ("worker", "role", "state", "kind", "reason", "le")
    return {
        (sample.name, *(sample.labels[label] for label in order if label in sample.labels)): sample.value
        for family in text_string_to_metric_families(metrics.expose(rows).decode())
        for sample in family.samples
    }


def test_a_request_is_counted() -> None:
    metrics = Metrics()
    timer = Timer(metrics, arrived=0.0, num_prompt=7)
    assert scrape(metrics)["diptych_requests_running",] == 1
    timer.tokens(1)
    timer.tokens(0)
    timer.tokens(3)
    timer.end("stop", cached=4)
    seen = scrape(metrics)
    assert seen["diptych_requests_running",] == 0
    assert seen["diptych_requests_total", "stop"] == 1
    assert seen["diptych_requests_total", "failed"] == 0
    assert seen["diptych_prompt_tokens_total",] == 7
    assert seen["diptych_prompt_tokens_cached_total",] == 4
    assert seen["diptych_generation_tokens_total",] == 4
    assert seen["diptych_time_to_first_token_seconds_count",] == 1
    assert seen["diptych_inter_token_latency_seconds_count",] == 3, "one gap less than tokens"
    assert seen["diptych_time_per_output_token_seconds_count",] == 1
    assert seen["diptych_e2e_request_latency_seconds_count",] == 1


def test_a_request_that_writes_nothing_is_counted() -> None:
    metrics = Metrics("tiny")
    timer = Timer(metrics, arrived=0.0, num_prompt=7)
    timer.computed()
    timer.end("computed", cached=4)
    seen = scrape(metrics)
    assert seen["diptych_requests_total", "computed"] == 1 and seen["diptych_requests_running",] == 0
    assert seen["diptych_prompt_tokens_total",] == 7 and seen["diptych_prompt_tokens_cached_total",] == 4
    assert seen["diptych_e2e_request_latency_seconds_count",] == 1
    assert seen["diptych_time_to_first_token_seconds_count",] == seen["diptych_generation_tokens_total",] == 0


def test_a_request_that_failed_has_no_latency() -> None:
    metrics = Metrics()
    Timer(metrics, arrived=0.0, num_prompt=7).end("failed")
    seen = scrape(metrics)
    assert seen["diptych_requests_total", "failed"] == 1
    assert seen["diptych_e2e_request_latency_seconds_count",] == 0
    assert seen["diptych_prompt_tokens_total",] == 0, "it never began to answer"


def test_workers_are_shown_as_they_are_now() -> None:
    metrics = Metrics()
    seen = scrape(metrics, ROW, {"id": "p0", "role": "prefill"})
    assert seen["diptych_worker_blocks", "d0", "decode", "free"] == 5
    assert seen["diptych_worker_requests_running", "d0", "decode"] == 3
    assert seen["diptych_worker_requests_waiting", "d0", "decode"] == 1
    assert seen["diptych_worker_state", "d0", "decode", "up"] == 1
    assert seen["diptych_worker_state", "p0", "prefill", "unknown"] == 1
    assert seen["diptych_worker_leases", "d0", "decode", "expected"] == 2
    assert not [name for name in scrape(metrics) if "d0" in name], "a worker that is gone is gone from the scrape"


def test_the_routers_metrics_stand_behind_ours() -> None:
    metrics, telemetry = Metrics("tiny"), Telemetry()
    telemetry.failed_over("worker_lost")
    text = metrics.expose([ROW], telemetry.expose()).decode()
    families = [family.name for family in text_string_to_metric_families(text)]
    assert "diptych_failovers" in families and len(families) == len(set(families))


def test_two_processes_worth_of_metrics_do_not_meet() -> None:
    one, other = Metrics(), Metrics()
    Timer(one, 0.0, 1).end("stop")
    assert scrape(other)["diptych_requests_total", "stop"] == 0


def test_no_counter_ever_falls() -> None:
    """Whatever becomes of requests, a scrape never shows less of a counter or of a bucket than the one before."""
    metrics, rng, before = Metrics("m"), random.Random(3), dict[tuple[str, ...], float]()
    timers = []
    for _ in range(300):
        if rng.random() < 0.4 or not timers:
            timers.append(Timer(metrics, perf_counter(), rng.randrange(1, 5000)))
        elif rng.random() < 0.6:
            rng.choice(timers).tokens(rng.randrange(4))
        else:
            timers.pop(rng.randrange(len(timers))).end(
                rng.choice(["stop", "length", "cancelled", "rejected", "failed"])
            )
        seen = scrape(metrics)
        counted = {name: value for name, value in seen.items() if name[0].endswith(("_total", "_count", "_bucket"))}
        assert len(counted) > 100 and all(value >= before.get(name, 0.0) for name, value in counted.items())
        before = counted


def test_buckets_reach_as_far_as_what_they_count() -> None:
    """Half of them below what is usual; none so coarse that a quantile means nothing."""
    for family in text_string_to_metric_families(Metrics().expose([]).decode()):
        if family.type == "histogram":
            edges = sorted({float(s.labels["le"]) for s in family.samples if s.name.endswith("_bucket")})[:-1]
            assert all(after / edge <= 5.0 for edge, after in itertools.pairwise(edges)), family.name
            assert edges[-1] >= 10.0 and edges[0] <= 1.0
