"""What the router counts: it never falls, and an exposed transfer has a cause."""

import logging
import random
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from diptych.serve import logs
from diptych.serve.account import Received
from diptych.serve.telemetry import CAUSES, Telemetry
from diptych.serve.waterfall import waterfall


def scrape(telemetry: Telemetry) -> dict[tuple[str, ...], float]:
    return {
        (sample.name, *(sample.labels[label] for label in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(telemetry.expose())
        for sample in family.samples
    }


def row(incarnation: int, num_bytes: int, worker: str = "d0", failed: int = 0) -> dict[str, Any]:
    moved = {"source": "p0", "lane": "shm", "purpose": "handover", "bytes": num_bytes, "reads": num_bytes // 10}
    return {"id": worker, "incarnation": incarnation, "kv": {"moved": [moved], "failed": failed}}


def test_bytes_are_those_of_all_incarnations() -> None:
    telemetry = Telemetry()
    for incarnation, num_bytes in ((0, 100), (0, 100), (0, 250), (1, 30), (1, 40)):
        telemetry.look([row(incarnation, num_bytes, failed=incarnation)])
    telemetry.look([])  # it is gone: what it read was read
    telemetry.look([{"id": "d0", "state": "silent"}])
    seen = scrape(telemetry)
    assert seen["diptych_kv_transfer_bytes_total", "shm", "handover", "p0", "d0"] == 290
    assert seen["diptych_kv_transfer_reads_total", "shm", "handover", "p0", "d0"] == 29


def test_no_counter_ever_falls() -> None:
    telemetry, rng, before = Telemetry(), random.Random(4), dict[tuple[str, ...], float]()
    incarnation, count = 0, 0
    for _ in range(200):
        match rng.randrange(4):
            case 0:
                incarnation, count = incarnation + 1, 0
            case 1:
                count += rng.randrange(1000)
                telemetry.look([row(incarnation, count, failed=count // 50)])
            case 2:
                telemetry.failed_over("worker_lost")
                telemetry.resumed(rng.random())
            case _:
                hand_over(telemetry, **{rng.choice(["memory", "transfer", "answer"]): rng.random()})
        everything = scrape(telemetry).items()
        seen = {key: value for key, value in everything if key[0].endswith(("_total", "_count", "_bucket"))}
        assert all(value >= before.get(key, 0.0) for key, value in seen.items())
        before = seen


def test_a_name_that_comes_back_counts_from_the_start() -> None:
    """A guest, say, whom nobody here counts."""
    telemetry = Telemetry()
    for num_bytes in (5000, 100):
        telemetry.look([row(0, num_bytes, failed=num_bytes // 10)])
    seen = scrape(telemetry)
    assert seen["diptych_kv_transfer_bytes_total", "shm", "handover", "p0", "d0"] == 5100
    assert seen["diptych_kv_transfer_failed_total", "d0"] == 510


def test_pairs_that_are_long_gone_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diptych.serve.telemetry.MAX_PAIRS", 3)
    telemetry = Telemetry()
    for worker in ("d0", "d1", "d2", "d0", "d3"):
        telemetry.look([row(0, 100, worker)])
        hand_over(telemetry, target=worker)
    targets = {key[-1] for key in scrape(telemetry) if key[0] == "diptych_kv_transfer_bytes_total"}
    assert targets == {"d0", "d2", "d3"}
    assert {key[-1] for key in scrape(telemetry) if key[0] == "diptych_kv_transfer_gbps"} == targets
    assert len(telemetry._seen) == 2 * 3 + 4  # `failed` is by worker


def hand_over(
    telemetry: Telemetry, read_s: float = 0.001, num_bytes: int = 1_000_000, target: str = "d0", **phases: float
) -> None:
    received = Received(64, "p0", "shm", "raw", "", num_bytes, 1, 0, read_s, 0.0, tuple(phases.items()))
    exposed_s = sum(phases.values())
    gap = waterfall(exposed_s + 0.01, phases.items())
    telemetry.handed_over("cmpl-1", target, received, gap, round(1e6 * exposed_s))


def test_an_exposed_transfer_has_a_cause(caplog: pytest.LogCaptureFixture) -> None:
    telemetry = Telemetry()
    with caplog.at_level(logging.WARNING):
        hand_over(telemetry, transfer=0.04, memory=0.001)
        assert not caplog.records, "not exposed for long"
        hand_over(telemetry, memory=0.08, transfer=0.01)
        hand_over(telemetry, transfer=0.07)
        hand_over(telemetry, answer=0.07)
        hand_over(telemetry, read_s=0.1, transfer=0.1)
    seen = scrape(telemetry)
    assert [seen["diptych_exposed_transfers_total", cause] for cause in CAUSES] == [1, 1, 1, 1]
    assert seen["diptych_kv_transfer_seconds_count", "exposed"] == seen["diptych_handover_gap_seconds_count",] == 5
    assert seen["diptych_kv_transfer_seconds_sum", "total"] == pytest.approx(0.104)
    assert 0.1 < seen["diptych_kv_transfer_gbps", "p0", "d0"] < 1.0
    (line,) = [logs.Lines("router").format(record) for record in caplog.records]
    assert line.endswith(" request=cmpl-1 attempt=64")
    assert "waited 90 ms for KV from p0 to d0; cause: memory (1000000 bytes over shm at 1.000 GB/s" in line
    assert "80 ms for memory, 10 ms for reads" in line
