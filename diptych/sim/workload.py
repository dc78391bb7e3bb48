"""Who asks for what, and when: synthetic arrivals.

An `Arrival` carries the true output length for the driver (the oracle); policies never see it. Lengths come from
`Lengths`, times from a renewal process (Poisson, burstier, or regular), prefixes from groups (a shared system prompt)
or conversations (turns that repeat all that was said). A recorded trace is a workload too (`trace.py`): `simulate`
takes any iterable in order of time.

Not responsible for text: a block's content is named by `block_hash(stem, index)`.
"""

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from math import exp, inf, log
from random import Random
from typing import Literal

from diptych.errors import ConfigError


def block_hash(stem: int, index: int) -> bytes:
    """The 16-byte name of block `index` of the text that grows from `stem`."""
    return stem.to_bytes(8, "big") + index.to_bytes(8, "big")


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request. `output_len` is the truth about its answer; `stem` names the text its answer continues.

    With `max_new` 0 it writes nothing: an embedding or a score. `kind` says which part of a mixed load
    it is, for reports.
    """

    time_s: float
    num_prompt: int
    max_new: int
    output_len: int
    hashes: tuple[bytes, ...] = ()
    priority: int = 0
    stem: int = 0
    kind: str = "chat"

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

    def __str__(self) -> str:
        """As `parse_lengths` reads it."""
        match self.kind:
            case "fixed":
                return f"{self.mean:g}"
            case "uniform":
                return f"{round(self.mean * (1 - self.spread))}-{round(self.mean * (1 + self.spread))}"
            case _:
                return f"~{self.mean:g}"

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


def parse_lengths(text: str) -> Lengths:
    """`512`: all alike; `64-200`: uniform, bounds included; `~512`: lognormal with that mean. ConfigError otherwise."""
    kind, numbers = ("lognormal", [text[1:]]) if text.startswith("~") else ("uniform", text.split("-"))
    if len(numbers) > 2 or not all(part.isdigit() and int(part) for part in numbers):
        raise ConfigError(f"{text!r}: lengths are tokens, like 512, 64-200 or ~512")
    low, high = int(numbers[0]), int(numbers[-1])
    if low > high:
        raise ConfigError(f"{text!r}: the smaller length comes first")
    if kind == "lognormal":
        return Lengths(low, "lognormal")
    # Half a token beyond each bound, so that rounding gives the bounds as often as what lies between them.
    mean = (low + high) / 2
    return Lengths(low) if low == high else Lengths(mean, "uniform", (high - low + 0.998) / 2 / mean)


@dataclass(frozen=True, slots=True)
class Workload:
    """Independent requests at `rate` per second.

    burstiness: the shape of the gamma distribution of the gaps, as in vLLM's benchmark: 1 is a Poisson process, less is
    burstier, `inf` is one request every 1 / rate seconds.

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
    burstiness: float = 1.0
    kind: str = "chat"

    def gap(self, random: Random) -> float:
        """Seconds to the next arrival."""
        if self.burstiness == 1:
            return random.expovariate(self.rate)
        if self.burstiness == inf:
            return 1 / self.rate
        return random.gammavariate(self.burstiness, 1 / (self.rate * self.burstiness))


def generate(workload: Workload, seed: int) -> Iterator[Arrival]:
    """Endless arrivals of a workload in order of time; the same for the same seed."""
    random = Random(seed)
    now = workload.start_s
    stem = (seed % (1 << 15)) << 48 | workload.priority % (1 << 8) << 40
    later: list[tuple[float, int, Arrival]] = []  # further turns of conversations under way
    ticket = count()
    while True:
        now += workload.gap(random)
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
        yield Arrival(when, num_prompt, max_new, output, common + own, workload.priority, stem, workload.kind)
        said = num_prompt + output
        when += random.expovariate(1 / workload.think_s)


def merge(*streams: Iterable[Arrival]) -> Iterator[Arrival]:
    """Several workloads at once, in order of time."""
    return heapq.merge(*streams, key=lambda arrival: arrival.time_s)


def first(arrivals: Iterable[Arrival], num: int) -> list[Arrival]:
    """The first so many of an endless workload."""
    return list(islice(arrivals, num))
