"""Recorded traces as workloads: who came when, with how long a prompt, and which prefixes were shared.

Two forms, told apart by their content, gzipped or not: the CSV of Azure's LLM inference traces (TIMESTAMP,
ContextTokens, GeneratedTokens; Patel et al., "Splitwise", 2024) and the JSONL of Mooncake's (timestamp in milliseconds,
input_length, output_length, hash_ids; Qin et al., "Mooncake", 2025). A hash id stands for 512 tokens: two prompts share
as much of a prefix as their first hash ids are equal. Not responsible for text (`workload.py` says what a block is) or
for what a trace's model was.
"""

import csv
import gzip
import hashlib
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from diptych.errors import ConfigError
from diptych.sim.workload import Arrival, block_hash

TOKENS_PER_ID = 512  # what one of Mooncake's hash ids stands for
_GZIP = b"\x1f\x8b"
_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


@dataclass(frozen=True, slots=True)
class Row:
    """One request of a trace; `time_s` counts from the first one."""

    time_s: float
    num_prompt: int
    num_output: int
    hash_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Scale:
    """How a trace is made to fit: times and lengths are multiplied, prompts cut at `max_prompt` tokens."""

    time: float = 1.0
    length: float = 1.0
    max_prompt: int | None = None

    def prompt(self, num: int) -> int:
        """How long a prompt of that many tokens becomes."""
        scaled = self.output(num)
        return min(scaled, self.max_prompt) if self.max_prompt else scaled

    def output(self, num: int) -> int:
        """How long an answer becomes."""
        return max(round(num * self.length), 1)


class _Line(msgspec.Struct, frozen=True):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...] = ()


def read_trace(path: Path) -> list[Row]:
    """All requests of a trace in order of time. ConfigError where it is neither form, naming the line."""
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if data.startswith(_GZIP) else data).decode()
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, EOFError, zlib.error) as error:
        raise ConfigError(f"{path}: {error}") from None
    rows = _read_jsonl(path, text) if text.lstrip().startswith("{") else _read_csv(path, text)
    if not rows:
        raise ConfigError(f"{path}: a trace without a request")
    start_s = min(row.time_s for row in rows)
    moved = (Row(row.time_s - start_s, row.num_prompt, row.num_output, row.hash_ids) for row in rows)
    return sorted(moved, key=lambda row: row.time_s)


def replayed(rows: Sequence[Row], scale: Scale | None = None, block_size: int = 16) -> Iterator[Arrival]:
    """A trace as arrivals. Answers, and prompts without hash ids, share nothing with each other.

    Sharing is exact to the block: a block belongs to the hash id of its last token, and to all before it.
    """
    scale = scale or Scale()
    for number, row in enumerate(rows):
        num_prompt, output = scale.prompt(row.num_prompt), scale.output(row.num_output)
        stem = 1 << 62 | number
        hashes = _hashes(row.hash_ids, max(round(TOKENS_PER_ID * scale.length), 1), num_prompt, block_size, stem)
        yield Arrival(row.time_s * scale.time, num_prompt, output, output, hashes, 0, stem)


def _hashes(ids: Sequence[int], tokens_per_id: int, num_prompt: int, size: int, stem: int) -> tuple[bytes, ...]:
    stems = list(_chained(ids))
    ends = ((i + 1) * size - 1 for i in range(num_prompt // size))
    owners = (end // tokens_per_id for end in ends)
    return tuple(block_hash(stems[k] if k < len(stems) else stem, i) for i, k in enumerate(owners))


def _chained(ids: Iterable[int]) -> Iterator[int]:
    """A name for each prefix of the ids."""
    state = hashlib.blake2b(digest_size=8)
    for each in ids:
        state.update(each.to_bytes(16, "big", signed=True))
        yield int.from_bytes(state.digest(), "big")


def _read_jsonl(path: Path, text: str) -> list[Row]:
    rows = []
    decoder = msgspec.json.Decoder(_Line)
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            found = decoder.decode(line)
        except msgspec.MsgspecError as error:
            raise ConfigError(f"{path}, line {number}: {error}") from None
        _check(path, number, found.input_length)
        rows.append(Row(found.timestamp / 1e3, found.input_length, found.output_length, found.hash_ids))
    return rows


def _read_csv(path: Path, text: str) -> list[Row]:
    reader = csv.DictReader(text.splitlines())
    if not set(_COLUMNS) <= set(reader.fieldnames or ()):
        raise ConfigError(f"{path}: neither a CSV with the columns {', '.join(_COLUMNS)} nor JSONL with hash_ids")
    rows = []
    for record in reader:
        try:
            stamp, num_prompt, num_output = (record[name] for name in _COLUMNS)
            row = Row(_seconds(stamp), int(num_prompt), int(num_output))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{path}, line {reader.line_num}: {error}") from None
        _check(path, reader.line_num, row.num_prompt)
        rows.append(row)
    return rows


def _seconds(stamp: str) -> float:
    """Of a timestamp like `2023-11-16 18:15:46.6805900`, with or without a zone, which is UTC; or plain seconds."""
    if stamp.replace(".", "", 1).isdigit():
        return float(stamp)
    plain = stamp.strip().removesuffix("Z").removesuffix("+00:00")
    return float(np.datetime64(plain, "ns").astype(np.int64)) / 1e9


def _check(path: Path, line: int, num_prompt: int) -> None:
    if num_prompt < 1:
        raise ConfigError(f"{path}, line {line}: a prompt of {num_prompt} tokens")
