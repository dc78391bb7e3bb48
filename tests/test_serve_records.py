"""Records, as the router's driver keeps them: placements, deliveries and workers' accounts on a scripted clock."""

import random
from typing import Any

from diptych.policy.messages import Place, Role, attempt_id
from diptych.serve.account import Prefilled, Received, Stalled
from diptych.serve.frontend import Label
from diptych.serve.records import MAX_SHOWN, Record, Records
from diptych.serve.wire import Note


def place(records: Records, now: float, record: Record, attempt: int, pair: tuple[str, str], why: str = "") -> int:
    """Place an attempt as the router does: the decode side hears first. One name twice: a mixed worker."""
    rid = attempt_id(record.number, attempt)
    parts = ((Role.DECODE, 1), (Role.PREFILL, 0)) if pair[0] != pair[1] else ((Role.MIXED, 0),)
    for part, at in parts:
        order = Place(pair[at], rid, part, "", record.num_prompt, record.num_prompt, 10, (), 0, 1)
        records.placed(now, record, order, why)
    return rid


def received(rid: int, **phases: float) -> Received:
    return Received(rid, "p0", "shm", "raw", "", 2_000_000, 3, 0, 0.002, 0.004, tuple(phases.items()))


def handed_over(records: Records) -> Record:
    """A request that goes through a pair: token 1 after 120 ms at the router, token 2 after another 30."""
    record = records.open(10.0, 5, Label("cmpl-1", "mine", 0), 100, 10)
    rid = place(records, 10.01, record, 0, ("p0", "d0"))
    records.accounted("p0", Prefilled(rid, 0.02, 0.07, 60, 40, 2))
    records.wrote(10.12, record, 1)
    records.accounted("d0", received(rid, memory=0.001, transfer=0.005, answer=0.002, queue=0.003, step=0.015))
    records.wrote(10.15, record, 1)
    return record


def adds_up(waterfall: dict[str, Any]) -> bool:
    parts = waterfall["parts"].values()
    return sum(parts) == waterfall["us"] and min(parts) >= 0


def test_both_waterfalls_add_up() -> None:
    records = Records()
    record = handed_over(records)
    (open_,) = records.find(10.2, "cmpl-1")
    assert records.telemetry.registry.get_sample_value("diptych_request_queue_time_seconds_sum") == 0.02
    assert records.telemetry.registry.get_sample_value("diptych_request_prefill_time_seconds_count") == 1
    assert open_["state"] == "running" and open_["ttft"] == {
        "seen_by": "router",
        "us": 120_000,
        "parts": {"place": 10_000, "queue": 20_000, "prefill": 70_000, "wire": 20_000},
    }
    record.end(10.15, "length")
    records.noted(Note("cmpl-1", 0, "length", 0.150, 0.012, 0.0, 0.001))
    (found,) = records.find(10.2, "mine")
    assert found["ttft"] == {
        "seen_by": "api",
        "us": 150_000,
        "parts": {"api": 12_000, "place": 10_000, "queue": 20_000, "prefill": 70_000, "out": 1000, "wire": 37_000},
    }
    parts = {"memory": 1000, "transfer": 5000, "answer": 2000, "queue": 3000, "step": 15_000, "wire": 4000}
    assert found["handover"] == {"us": 30_000, "parts": parts}
    transfer = found["transfer"]
    assert (transfer["bytes"], transfer["us"], transfer["gb_per_s"]) == (2_000_000, 2000, 1.0)
    assert (transfer["exposed_us"], transfer["hidden_us"], transfer["lane"]) == (8000, 4000, "shm")
    assert found["state"] == found["finish"] == "length"
    assert (found["prompt_tokens"], found["cached_tokens"], found["output_tokens"]) == (100, 40, 2)


def test_whatever_is_measured_it_adds_up() -> None:
    rng = random.Random(2)
    for number in range(300):
        records = Records()
        record = records.open(0.0, number, Label("a"), 100, 10)
        now, rid = 0.0, 0
        for attempt in range(rng.randint(1, 4)):
            now += rng.random()
            rid = place(records, now, record, attempt, ("p0", rng.choice(["p0", "d0"])), "worker_lost")
            if rng.random() < 0.8:
                records.accounted("p0", Prefilled(rid, rng.random(), rng.random(), 1, 2, 3))
            if rng.random() < 0.8:
                records.accounted("d0", received(rid, memory=rng.random(), transfer=rng.random(), step=rng.random()))
            for _ in range(rng.randint(0, 3)):
                now += rng.random()
                records.wrote(now, record, rng.randint(1, 2))
        if rng.random() < 0.5:
            records.noted(Note("a", 0, "stop", rng.random(), rng.random(), rng.random(), rng.random()))
        (found,) = records.find(now, "a")
        gaps = [failover["resume"] for failover in found["failovers"]]
        assert all(adds_up(w) for w in (found["ttft"], found["handover"], *gaps) if w is not None)


def test_a_failover_has_its_gap() -> None:
    records = Records()
    record = handed_over(records)
    rid = place(records, 10.25, record, 1, ("p0", "d1"), "worker_lost")
    records.accounted("p0", Prefilled(rid, 0.01, 0.03, 2, 100, 1))
    records.wrote(10.35, record, 1)
    (found,) = records.find(11.0, "cmpl-1")
    (failover,) = found["failovers"]
    assert (failover["reason"], failover["token"]) == ("worker_lost", 2)
    parts = {"lost": 100_000, "queue": 10_000, "prefill": 30_000, "wire": 60_000}
    assert failover["resume"] == {"us": 200_000, "parts": parts}
    assert found["ttft"]["us"] == 120_000, "of the first attempt, as before"
    assert [attempt["decode"] for attempt in found["attempts"]] == ["d0", "d1"]
    assert found["attempts"][0]["gave_up"] == "worker_lost" and found["cached_tokens"] == 40
    text = records.telemetry.expose()
    assert (
        'diptych_failovers_total{reason="worker_lost"} 1.0' in text and "diptych_resume_gap_seconds_count 1.0" in text
    )


def test_an_attempt_that_wrote_nothing_belongs_to_the_first_token() -> None:
    records = Records()
    record = records.open(0.0, 1, Label("a"), 10, 10)
    place(records, 0.5, record, 0, ("p0", "d0"))
    rid = place(records, 2.0, record, 1, ("p1", "d0"), "refused")
    records.accounted("p1", Prefilled(rid, 0.25, 0.5, 10, 0, 1))
    records.wrote(3.0, record, 1)
    (found,) = records.find(3.0, "a")
    parts = {"place": 500_000, "retry": 1_500_000, "queue": 250_000, "prefill": 500_000, "wire": 250_000}
    assert found["ttft"]["parts"] == parts and found["handover"] is None
    assert found["failovers"] == [{"reason": "refused", "token": 0, "resume": None}]


def test_stalls_stand_out_and_have_causes() -> None:
    records = Records()
    record = records.open(0.0, 5, Label("a"), 10, 100)
    rid = place(records, 0.0, record, 0, ("p0", "d0"))
    now = 0.1
    for token in range(40):
        now += {1: 0.3, 7: 0.2, 20: 0.4, 30: 0.06}.get(token, 0.02)
        records.wrote(now, record, 1)
    records.accounted("d0", Stalled(rid, ((7, "preempted"), (8, "step"))))
    record.end(now, "stop")
    (found,) = records.find(now, "a")
    assert found["median_gap_us"] == 20_000
    assert [(late["token"], late["us"], late["cause"]) for late in found["stalls"]] == [
        (1, 300_000, "handover"),
        (7, 200_000, "preempted"),
        (20, 400_000, "unknown"),
    ]
    assert not record.gaps, "what is not shown is not kept"


def test_accounts_of_strangers_are_nothing() -> None:
    records = Records()
    records.accounted("p0", Prefilled(attempt_id(7, 0), 1.0, 1.0, 1, 0, 1))
    records.open(0.0, 7, Label(), 1, 1)
    records.accounted("p0", Prefilled(attempt_id(7, 0), 1.0, 1.0, 1, 0, 1))
    records.noted(Note("nobody", 0, "stop", 1.0, 0.0, 0.0, 0.0))
    (found,) = records.find(1.0, "request-7")
    assert found["ttft"] is None and found["attempts"] == []


def test_the_ring_is_bounded_and_so_are_its_names() -> None:
    records = Records(num_kept=10)
    for number in range(1000):
        records.open(number, number, Label(f"cmpl-{number // 2}", "always the same", number % 2), 1, 1)
    assert [found["id"] for found in records.latest(1000.0, 3)] == ["cmpl-499", "cmpl-499", "cmpl-498"]
    assert len(records.latest(1000.0, MAX_SHOWN)) == len(records.find(1000.0, "always the same")) == 10
    assert [found["index"] for found in records.find(1000.0, "cmpl-499")] == [0, 1]
    assert records.find(1000.0, "cmpl-400") == [] and len(records._by_name) == 6
