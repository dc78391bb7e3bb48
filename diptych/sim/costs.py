"""What things cost: seconds of a step, of a message, of moving KV.

A step's cost is linear: seconds = a + b * (new tokens) + c * (context tokens read), the form in which `policy/pace.py`
learns it and `bench` calibrates it. Anything that says `CostModel` may stand in (a roofline of some hardware, say).

Not responsible for sharing a link among transfers (`links.py`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isqrt
from typing import Literal, Protocol

from diptych.linkrates import LinkRates
from diptych.sim.agenda import SECOND


class CostModel(Protocol):
    """How long one worker's steps take, in femtoseconds."""

    def step(self, num_new: int, context: int) -> int:
        """A step of `num_new` new tokens that reads `context` tokens of KV, summed over its sequences."""
        ...

    def growth(self, num_decodes: int) -> int | None:
        """How much longer each repetition of such a step of decodes is than the one before; None if not constant."""
        ...


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds = a + b * new tokens + c * context tokens, kept as whole femtoseconds."""

    a: float
    b: float
    c: float
    _whole: tuple[int, int, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        whole = tuple(round(value * SECOND) for value in (self.a, self.b, self.c))
        if min(whole) < 0 or sum(whole) <= 0:
            raise ValueError(f"a step must take time: {self}")
        object.__setattr__(self, "_whole", whole)

    def step(self, num_new: int, context: int) -> int:
        """Femtoseconds of one step; at least one, so that time goes on."""
        a, b, c = self._whole
        return max(a + b * num_new + c * context, 1)

    def growth(self, num_decodes: int) -> int | None:
        """Every decode reads one token more than the step before."""
        return self._whole[2] * num_decodes


@dataclass(frozen=True, slots=True)
class Link:
    """What KV travels over. Concurrent transfers on one link share it fairly.

    shared: who is on one link: each pair of workers, all that leaves a source, all that enters a target, or everyone.
    rates: of pairs that have a link of their own, instead.
    """

    bytes_per_s: float = 25e9
    latency_s: float = 20e-6
    shared: Literal["pair", "source", "target", "all"] = "source"
    rates: LinkRates = LinkRates()

    def key(self, source: str, target: str) -> tuple[str, str]:
        """Which link a transfer is on."""
        if self.rates.of(source, target) is not None:
            return source, target
        match self.shared:
            case "pair":
                return source, target
            case "source":
                return source, ""
            case "target":
                return "", target
            case _:
                return "", ""

    def rate(self, key: tuple[str, str]) -> float:
        """Bytes per second of the link of that key."""
        return (self.rates.of(*key) if all(key) else None) or self.bytes_per_s


@dataclass(frozen=True, slots=True)
class Costs:
    """Everything that takes time in a simulated cluster, but for the link."""

    step: CostModel = StepCost(8e-3, 4e-5, 4e-8)
    per_worker: Mapping[str, CostModel] = field(default_factory=dict)  # where workers differ
    kv_bytes_per_token: int = 131072
    message_s: float = 100e-6  # between any two processes
    settle_s: float = 50e-6  # from asking a read to stop until no byte can land

    def of(self, worker: str) -> CostModel:
        """The cost model of one worker."""
        return self.per_worker.get(worker, self.step)


def elapsed(first: int, growth: int, count: int) -> int:
    """Femtoseconds of `count` repetitions, the first of `first`, each `growth` longer than the one before."""
    return count * first + growth * (count * (count - 1) // 2)


def done_by(first: int, growth: int, span: int) -> int:
    """How many whole repetitions fit into `span` femtoseconds: the inverse of `elapsed`."""
    if growth == 0:
        return span // first
    b = 2 * first - growth
    return (isqrt(b * b + 8 * growth * span) - b) // (2 * growth)
