"""A small paced cluster of real processes, brought up, loaded and measured as the benchmarks do it."""

from pathlib import Path

import pytest

from diptych.bench.clusters import Measured, measure, vocab_of, worded
from diptych.bench.load import shots
from diptych.bench.report import by_kind
from diptych.config import load_cluster
from diptych.serve.text import Text
from diptych.sim.load import Load
from diptych.sim.workload import parse_lengths

FAST = {"base_ms": 1.0, "new_token_us": 5.0, "context_token_us": 0.0, "vocab": 64}
LOAD = Load(
    10.0,
    prompt=parse_lengths("20-40"),
    output=parse_lengths("4-8"),
    long_every_s=0.5,
    long_prompt=parse_lengths("600-700"),
    long_output=parse_lengths("2-4"),
    seconds=1.0,
    seed=1,
)


@pytest.fixture(scope="module")
def measured() -> Measured:
    cluster = load_cluster(None, {"engine": "paced", "prefill": 1, "decode": 1, "paced": FAST})
    with worded(cluster) as ready:
        asked = list(shots(LOAD.arrivals(), vocab_of(ready)))
        return measure(ready, asked, asked[:2], drain_s=5.0)


def test_every_token_of_every_answer_is_seen_by_itself(measured: Measured) -> None:
    assert len(measured.records) > 5
    for record in measured.records:
        assert not record.error
        assert len(record.times_s) == record.num_tokens == record.max_tokens
        assert record.sent_s < record.times_s[0] and record.times_s == sorted(record.times_s)


def test_the_summary_has_both_kinds(measured: Measured) -> None:
    found = by_kind(measured.records)
    assert set(found) == {"chat", "long", "all"}
    assert found["all"].num_errors == found["all"].num_unseen == 0


def test_every_process_is_accounted_for(measured: Measured) -> None:
    assert set(measured.usage.processes) == {"router", "api", "p0", "d0", "client"}
    assert all(use.cpu_s >= 0 for use in measured.usage.processes.values())


def test_the_workers_said_how_they_are(measured: Measured) -> None:
    rows = {row["id"]: row for row in measured.workers}
    assert rows["d0"]["kv"]["transfers"] > 0 and rows["d0"]["kv"]["failed"] == 0


def test_one_word_for_every_id() -> None:
    cluster = load_cluster(None, {"engine": "paced", "mixed": 1, "paced": FAST})
    with worded(cluster) as ready:
        folder = Path(ready.folder)
        text = Text.load(folder)
        assert text.vocab_size == 64 and not text.special_ids
        assert text.decode([0, 63, 5]).split() == ["w0", "w63", "w5"]
        assert ready.port == 0 and ready.host == "127.0.0.1"
    assert not folder.exists(), "nothing is left behind"
