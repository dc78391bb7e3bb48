"""Both forms of a trace: read, told apart, scaled, and with exactly the prefixes that they say."""

import gzip
from itertools import combinations
from pathlib import Path

import pytest

from diptych.errors import ConfigError
from diptych.sim.trace import Row, Scale, read_trace, replayed
from diptych.sim.workload import Arrival

TRACES = Path(__file__).parent / "traces"
AZURE, MOONCAKE = TRACES / "azure.csv", TRACES / "mooncake.jsonl"


def shared_blocks(one: Arrival, other: Arrival) -> int:
    """How many blocks of prefix two arrivals have in common."""
    pairs = zip(one.hashes, other.hashes, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one.hashes), len(other.hashes)))


def test_the_csv_of_azure() -> None:
    rows = read_trace(AZURE)
    assert [(row.num_prompt, row.num_output) for row in rows] == [(374, 44), (20, 3), (1200, 9)], "in order of time"
    assert [row.time_s for row in rows] == pytest.approx([0.0, 0.25, 0.5])


def test_the_jsonl_of_mooncake() -> None:
    rows = read_trace(MOONCAKE)
    assert rows[0] == Row(0.0, 1300, 20, (0, 1, 2)) and [row.time_s for row in rows] == [0.0, 0.0, 3.0, 6.0]


@pytest.mark.parametrize("source", [AZURE, MOONCAKE])
def test_a_trace_may_be_compressed(source: Path, tmp_path: Path) -> None:
    packed = tmp_path / "trace"
    packed.write_bytes(gzip.compress(source.read_bytes()))
    assert read_trace(packed) == read_trace(source)


def test_times_may_have_a_zone_or_be_seconds(tmp_path: Path) -> None:
    for first, second in (("2024-05-10 00:00:00.5+00:00", "2024-05-10 00:00:02+00:00"), ("7.5", "9")):
        trace = tmp_path / "trace.csv"
        trace.write_text(f"TIMESTAMP,ContextTokens,GeneratedTokens\n{first},1,1\n{second},1,1\n")
        assert [row.time_s for row in read_trace(trace)] == pytest.approx([0.0, 1.5])


def test_prompts_share_as_much_as_their_hash_ids_say() -> None:
    one, two, three, four = replayed(read_trace(MOONCAKE))
    assert shared_blocks(one, two) == 2 * 512 // 16 and shared_blocks(one, three) == 512 // 16
    assert shared_blocks(one, four) == 0, "an id is the same text only after the same ids"
    assert len(one.hashes) == 1300 // 16
    assert not any(shared_blocks(a, b) for a, b in combinations(replayed(read_trace(AZURE)), 2))


def test_the_answer_belongs_to_nobody_else() -> None:
    same = [Row(0.0, 1024, 50, (0, 1)), Row(0.0, 1024, 50, (0, 1))]
    one, two = replayed(same)
    assert one.hashes == two.hashes and one.text_hash(64) != two.text_hash(64)


def test_a_trace_is_made_to_fit() -> None:
    scale = Scale(time=0.5, length=1 / 32, max_prompt=36)
    one, two, three, four = replayed(read_trace(MOONCAKE), scale)
    assert [a.num_prompt for a in (one, two, three, four)] == [36, 34, 22, 19], "a hash id is 16 tokens now"
    assert [a.output_len for a in (one, two, three, four)] == [1, 1, 1, 1]
    assert (three.time_s, four.time_s) == (1.5, 3.0)
    assert shared_blocks(one, two) == 2 and shared_blocks(one, three) == 1
    assert min(a.num_prompt for a in replayed(read_trace(MOONCAKE), Scale(length=1e-9))) == 1


def test_a_prompt_may_be_longer_than_its_ids() -> None:
    one, two = replayed([Row(0.0, 1024, 1, (7,)), Row(0.0, 1024, 1, (7,))])
    assert shared_blocks(one, two) == 32


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "neither"),
        ("a,b\n1,2\n", "neither"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "without a request"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16,x,2\n", "line 2"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,2\n", "line 2"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16,1\n", "line 2"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16,0,2\n", "line 2: a prompt of 0"),
        ('{"timestamp": 0, "input_length": 5, "output_length": 1}\n{"timestamp": 1}\n', "line 2"),
        ('{"timestamp": 0, "input_length": "5", "output_length": 1}', "line 1"),
    ],
)
def test_what_is_no_trace_is_refused(text: str, why: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    trace.write_text(text)
    with pytest.raises(ConfigError, match=why):
        read_trace(trace)


def test_a_file_that_is_not_there_or_not_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        read_trace(tmp_path / "nothing")
    for data in (b"\x1f\x8b\x00", b"\xff\xfe\xff", gzip.compress(b"TIMESTAMP")[:-4]):
        (tmp_path / "trace").write_bytes(data)
        with pytest.raises(ConfigError):
            read_trace(tmp_path / "trace")
