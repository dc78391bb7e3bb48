"""Who asks what and when, from a seed; and sending it: open loop (arrivals do not wait for answers) or closed.

A `Shot` is one request to be sent. The same arguments and seed give the same shots, down to the token ids, so that two
servers can be given the very same load. Prompts are random tokens: no two share a block of prefix. Not responsible for
HTTP (`client.py`) or for what came out (`report.py`).
"""

import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from random import Random
from time import perf_counter
from typing import Any

from diptych.bench.client import Client, Record, completion


@dataclass(frozen=True, slots=True)
class Shape:
    """A kind of request: prompt and answer lengths in tokens, each uniform between two bounds (inclusive)."""

    kind: str
    prompt: tuple[int, int]
    answer: tuple[int, int]


CHAT = Shape("chat", (64, 200), (64, 128))
LONG = Shape("long", (2000, 4000), (16, 32))


@dataclass(frozen=True, slots=True)
class Shot:
    """One request: sent at `at_s` after the start. `fields` are further fields of its body."""

    at_s: float
    kind: str
    prompt: Sequence[int] | str
    max_tokens: int
    fields: Mapping[str, Any] = field(default_factory=dict)

    def body(self) -> bytes:
        """What is posted."""
        prompt = self.prompt if isinstance(self.prompt, str) else list(self.prompt)
        return completion(prompt, self.max_tokens, **self.fields)

    def record(self, start_s: float) -> Record:
        """Its empty record. How many tokens a text is, only the server knows."""
        num_prompt = 0 if isinstance(self.prompt, str) else len(self.prompt)
        return Record(self.kind, num_prompt, self.max_tokens, start_s + self.at_s)


@dataclass(frozen=True, slots=True)
class Mix:
    """A mixed load: chats at `rate` per second (Poisson), and a long prompt every `long_every_s` seconds."""

    rate: float
    long_every_s: float
    chat: Shape = CHAT
    long: Shape = LONG


def poisson(shape: Shape, rate: float, seconds: float, seed: int, vocab: int) -> list[Shot]:
    """Shots of one shape at `rate` per second on average, memoryless, for so many seconds."""
    return _shots(shape, _memoryless(rate, Random(f"{seed}/{shape.kind}/times")), seconds, seed, vocab)


def regular(shape: Shape, every_s: float, seconds: float, seed: int, vocab: int) -> list[Shot]:
    """Shots of one shape at fixed gaps, the first after half a gap."""
    return _shots(shape, (every_s * (i + 0.5) for i in range(1 << 62)), seconds, seed, vocab)


def mixed(mix: Mix, seconds: float, seed: int, vocab: int, fields: Mapping[str, Any] | None = None) -> list[Shot]:
    """Chats and long prompts, in order of time; `fields` go into every body."""
    shots = poisson(mix.chat, mix.rate, seconds, seed, vocab) if mix.rate > 0 else []
    if mix.long_every_s > 0:
        shots += regular(mix.long, mix.long_every_s, seconds, seed, vocab)
    shots = [replace(shot, fields=fields) for shot in shots] if fields else shots
    return sorted(shots, key=lambda shot: shot.at_s)


def _memoryless(rate: float, random: Random) -> Iterator[float]:
    now = 0.0
    while True:
        now += random.expovariate(rate)
        yield now


def _shots(shape: Shape, times: Iterator[float], seconds: float, seed: int, vocab: int) -> list[Shot]:
    random = Random(f"{seed}/{shape.kind}/prompts")
    shots = []
    for at_s in takewhile(lambda at_s: at_s < seconds, times):
        num_prompt, num_answer = random.randint(*shape.prompt), random.randint(*shape.answer)
        shots.append(Shot(at_s, shape.kind, tuple(random.choices(range(vocab), k=num_prompt)), num_answer))
    return shots


# --- sending ---------------------------------------------------------------------------------------------------


async def open_loop(client: Client, shots: Iterable[Shot], drain_s: float = 30.0) -> list[Record]:
    """Send each shot at its time, whatever became of the others.

    After the last one answers may go on for `drain_s`; what is not over then is cut off with the error "unfinished".
    """
    prepared = [(shot, shot.body()) for shot in shots]
    start_s = perf_counter() + 0.05
    records, tasks = [], []
    for shot, body in prepared:
        record = shot.record(start_s)
        records.append(record)
        await asyncio.sleep(max(record.due_s - perf_counter(), 0.0))
        tasks.append(asyncio.create_task(client.send(body, record)))
    if tasks:
        _, late = await asyncio.wait(tasks, timeout=drain_s)
        await _cut_off(late)
    return records


async def closed_loop(
    client: Client, shots: Iterable[Shot], concurrency: int, seconds: float, drain_s: float = 30.0
) -> list[Record]:
    """Keep `concurrency` requests under way for so many seconds, or until the shots run out; their times count not."""
    supply = iter(shots)
    records: list[Record] = []
    start_s = perf_counter()

    async def one_after_the_other() -> None:
        while perf_counter() - start_s < seconds:
            shot = next(supply, None)
            if shot is None:
                return
            record = shot.record(0.0)
            record.due_s = perf_counter()
            records.append(record)
            await client.send(shot.body(), record)

    tasks = [asyncio.create_task(one_after_the_other()) for _ in range(concurrency)]
    _, late = await asyncio.wait(tasks, timeout=seconds + drain_s)
    await _cut_off(late)
    return records


async def _cut_off(tasks: Iterable["asyncio.Task[object]"]) -> None:
    late = list(tasks)
    for task in late:
        task.cancel()
    await asyncio.gather(*late, return_exceptions=True)
