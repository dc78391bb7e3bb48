"""A load's arrivals as requests with prompts, and sending them: open loop (arrivals do not wait for answers) or closed.

A `Shot` is one request to be sent. The same arrivals give the same shots, down to the token ids, so that two servers
can be given the very same load. A block of a prompt is written from its name (`sim/workload.py`): prompts share a
prefix where their arrivals do, and no further. Not responsible for who comes when (`sim/load.py`), for HTTP
(`client.py`) or for what came out (`report.py`).
"""

import asyncio
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np

from diptych.bench.client import Client, Record, chat_completion, completion
from diptych.sim.workload import Arrival

BLOCK = 16  # tokens that are written from one name; what servers share, they share in blocks of this or a multiple
_BYTES = 4 * BLOCK
DAY_S = 86400.0
_WORDS = """time year people way day man thing woman life child world school state family student group country problem
hand part place case week company system program question work government number night point home water room mother area
money story fact month lot right study book eye job word business issue side kind head house service friend father power
hour game line end member law car city community name"""
WORDS = tuple(_WORDS.split())
"""Common enough to be one token each in most vocabularies, with the space before it."""


@dataclass(frozen=True, slots=True)
class Shot:
    """One request: sent at `at_s` after the start. `fields` are further fields of its body; None takes one away."""

    at_s: float
    kind: str
    prompt: Sequence[int]
    max_tokens: int
    fields: Mapping[str, Any] = field(default_factory=dict)
    chat: bool = False

    def body(self) -> bytes:
        """What is posted: token ids, or for a chat about as many words."""
        if self.chat:
            text = " ".join(WORDS[token % len(WORDS)] for token in self.prompt)
            return chat_completion(text, self.max_tokens, **self.fields)
        return completion(list(self.prompt), self.max_tokens, **self.fields)

    def record(self, start_s: float) -> Record:
        """Its empty record."""
        return Record(self.kind, len(self.prompt), self.max_tokens, start_s + self.at_s)


def shots(
    arrivals: Iterable[Arrival], vocab: int, fields: Mapping[str, Any] | None = None, chat: bool = False
) -> Iterator[Shot]:
    """A shot for each arrival (of blocks of 16 tokens), with token ids below `vocab`."""
    for arrival in arrivals:
        yield Shot(arrival.time_s, arrival.kind, prompt_of(arrival, vocab), arrival.output_len, fields or {}, chat)


def prompt_of(arrival: Arrival, vocab: int) -> list[int]:
    """The token ids of its prompt: those of each block follow from the block's name."""
    names = map(arrival.text_hash, range(-(-arrival.num_prompt // BLOCK)))
    written = b"".join(hashlib.shake_128(name).digest(_BYTES) for name in names)
    ids: list[int] = (np.frombuffer(written, "<u4") % vocab)[: arrival.num_prompt].tolist()
    return ids


# --- sending ---------------------------------------------------------------------------------------------------


async def open_loop(
    client: Client, shots: Iterable[Shot], drain_s: float = 30.0, records: list[Record] | None = None
) -> list[Record]:
    """Send each shot at its time, whatever became of the others. `records` is filled as they are sent.

    After the last one answers may go on for `drain_s`; what is not over then is cut off with the error "unfinished".
    """
    prepared = [(shot, shot.body()) for shot in shots]
    start_s = perf_counter() + 0.05
    records = [] if records is None else records
    tasks: list[asyncio.Task[Record]] = []
    try:
        for shot, body in prepared:
            record = shot.record(start_s)
            await asyncio.sleep(max(record.due_s - perf_counter(), 0.0))
            records.append(record)
            tasks.append(asyncio.create_task(client.send(body, record)))
        if tasks:
            await asyncio.wait(tasks, timeout=drain_s)
    finally:
        await _cut_off(tasks)
    return records


async def closed_loop(
    client: Client,
    shots: Iterable[Shot],
    concurrency: int,
    seconds: float,
    drain_s: float = 30.0,
    records: list[Record] | None = None,
) -> list[Record]:
    """Keep `concurrency` requests under way for so many seconds, or until the shots run out; their times count not."""
    supply = iter(shots)
    records = [] if records is None else records
    start_s = perf_counter()

    async def one_after_the_other() -> None:
        while perf_counter() - start_s < seconds:
            shot = next(supply, None)
            if shot is None:
                return
            body, record = shot.body(), shot.record(0.0)
            record.due_s = perf_counter()
            records.append(record)
            await client.send(body, record)

    tasks = [asyncio.create_task(one_after_the_other()) for _ in range(concurrency)]
    try:
        await asyncio.wait(tasks, timeout=min(seconds, DAY_S) + drain_s)
    finally:
        await _cut_off(tasks)
    return records


async def _cut_off(tasks: Iterable["asyncio.Task[Any]"]) -> None:
    """End those that still run; also when the whole load is given up in the middle."""
    late = [task for task in tasks if not task.done()]
    for task in late:
        task.cancel()
    await asyncio.gather(*late, return_exceptions=True)
