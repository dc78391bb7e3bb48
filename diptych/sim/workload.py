"""Who asks for what, and when: synthetic arrivals.

An `Arrival` carries the true output length for the driver (the oracle); policies never see it. Lengths come from
`Lengths`, times from a Poisson process, prefixes from groups (a shared system prompt) or conversations (turns that
repeat all that was said). A recorded trace becomes a workload by yielding `Arrival`s: `simulate` takes any iterable
in order of time.

Not responsible for text: a block's content is named by `block_hash(stem, index)`.
"""

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from math import exp, log
from random import Random
from typing import Literal


def block_hash(stem: int, index: int) -> bytes:
    """The 16-byte name of block `index` of the text that grows from `stem`."""
    return stem.to_bytes(8, "big") + index.to_bytes(8, "big")


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request. `output_len` is the truth about its answer; `stem` names the text its answer continues.

    With `max_new` 0 it writes nothing: an embedding or a score.
    """

    time_s: float
    num_prompt: int
    max_new: int
    output_len: int
    hashes: tuple[bytes, ...] = ()
    priority: int = 0
    stem: int = 0

    def __post_init__(self) -> None:
        if self.num_prompt < 1 or not min(1, self.max_new) <= self.output_len <= self.max_new:
            raise ValueError(
                f"lengths must hold 1 <= prompt and 1 <= output <= max_new, or 0 = output = max_new: {self}"
            )

    def text_hash(self, index: int) -> bytes:
        """The hash of a full block of its text, prompt or answer."""
        return self.hashes[index] if index < len(self.hashes) else block_hash(self.stem, index)


@dataclass(frozen=True, slots=True)
class Lengths:
    """A distribution of lengths in tokens with a given mean: fixed, uniform in mean * (1 +- spread), or lognormal.

    For the lognormal `spread` is the sigma of the logarithm. `limit` cuts it off.
    """

    mean: float
    kind: Literal["fixed", "uniform", "lognormal"] = "fixed"
    spread: float = 0.5
    limit: int = 1 << 20

    def draw(self, random: Random) -> int:
        """One length, at least 1."""
        match self.kind:
            case "fixed":
                value = self.mean
            case "uniform":
                value = self.mean * random.uniform(1 - self.spread, 1 + self.spread)
            case _:
                value = exp(random.gauss(log(self.mean) - self.spread**2 / 2, self.spread))
        return min(max(round(value), 1), self.limit)


@dataclass(frozen=True, slots=True)
class Workload:
    """Independent requests at `rate` per second.

    shared_prompt tokens of each prompt are the same within each of `groups` groups. With turns > 1 a client comes
    back `think_s` after each arrival (mean) with all that was said before and a new prompt. max_new: what clients
    ask for; None: exactly what they will get, so that answers end by length; 0: nothing, as for an embedding.
    """

    rate: float
    prompt: Lengths = Lengths(512)
    output: Lengths = Lengths(128)
    max_new: int | None = None
    groups: int = 1
    shared_prompt: int = 0
    turns: int = 1
    think_s: float = 10.0
    block_size: int = 16
    priority: int = 0
    start_s: float = 0.0


def poisson(workload: Workload, seed: int) -> Iterator[Arrival]:
    """Endless arrivals of a workload in order of time; the same for the same seed."""
    random = Random(seed)
    now = workload.start_s
    stem = (seed % (1 << 15)) << 48 | workload.priority % (1 << 8) << 40
    later: list[tuple[float, int, Arrival]] = []  # further turns of conversations under way
    ticket = count()
    while True:
        now += random.expovariate(workload.rate)
        stem += workload.turns
        for turn in _conversation(workload, random, now, stem):
            heapq.heappush(later, (turn.time_s, next(ticket), turn))
        while later and later[0][0] <= now:
            yield heapq.heappop(later)[2]


def _conversation(workload: Workload, random: Random, start_s: float, stem: int) -> Iterator[Arrival]:
    """The turns of one client: each prompt is all that was said before and something new."""
    shared = workload.shared_prompt // workload.block_size
    group = 1 << 63 | random.randrange(workload.groups)
    said, when = 0, start_s
    for turn in range(workload.turns):
        num_prompt = said + workload.prompt.draw(random) + (workload.shared_prompt if turn == 0 else 0)
        output = workload.output.draw(random)
        max_new = output if workload.max_new is None else workload.max_new
        output = min(output, max_new)
        blocks = num_prompt // workload.block_size
        common = tuple(block_hash(group, i) for i in range(min(shared, blocks)))
        own = tuple(block_hash(stem, i) for i in range(len(common), blocks))
        yield Arrival(when, num_prompt, max_new, output, common + own, workload.priority, stem)
        said = num_prompt + output
        when += random.expovariate(1 / workload.think_s)


def merge(*streams: Iterable[Arrival]) -> Iterator[Arrival]:
    """Several workloads at once, in order of time."""
    return heapq.merge(*streams, key=lambda arrival: arrival.time_s)


def mixed_load(rate: float, seed: int, long_prompt: int = 8192, every_s: float = 5.0) -> Iterator[Arrival]:
    """Short chats, and a long prompt every few seconds: where chunking and disaggregation show."""
    chats = Workload(rate, Lengths(256, "lognormal", 0.6, 2048), Lengths(128, "lognormal", 0.6, 1024))
    return merge(poisson(chats, seed), _periodic(long_prompt, every_s, chats.block_size))


def _periodic(num_prompt: int, every_s: float, block_size: int) -> Iterator[Arrival]:
    stem = 1 << 62
    while True:
        stem += 1
        hashes = tuple(block_hash(stem, i) for i in range(num_prompt // block_size))
        yield Arrival((stem - (1 << 62)) * every_s, num_prompt, 32, 32, hashes, 0, stem)


def first(arrivals: Iterable[Arrival], num: int) -> list[Arrival]:
    """The first so many of an endless workload."""
    return list(islice(arrivals, num))
