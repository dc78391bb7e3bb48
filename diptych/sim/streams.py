"""What the clients of a simulated cluster see: tokens and when they came, kept as stretches rather than one by one.

Not responsible for statistics (`report.py`).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from diptych.sim.agenda import seconds
from diptych.sim.costs import done_by, elapsed
from diptych.sim.workload import Arrival


class Stretch(NamedTuple):
    """Tokens of consecutive steps: token i of the stretch comes `elapsed(first, growth, i + 1)` after `started`."""

    num: int
    started: int
    first: int
    growth: int

    def token(self, index: int) -> int:
        """The instant of one of its tokens."""
        return self.started + elapsed(self.first, self.growth, index + 1)

    def later(self, delay: int) -> "Stretch":
        """The same, that much later."""
        return Stretch(self.num, self.started + delay, self.first, self.growth)

    def is_followed_by(self, other: "Stretch") -> bool:
        """Both are one: the other goes on where this one ends."""
        alike = other.growth == self.growth and other.first == self.first + self.num * self.growth
        return alike and other.started == self.token(self.num - 1)

    def part(self, begin: int, end: int) -> "Stretch":
        """Its tokens begin..end."""
        started = self.token(begin - 1) if begin else self.started
        return Stretch(end - begin, started, self.first + begin * self.growth, self.growth)

    def num_before(self, when: int) -> int:
        """How many of its tokens come before that instant."""
        span = when - 1 - self.started
        return min(done_by(self.first, self.growth, span), self.num) if span > 0 else 0


@dataclass(slots=True)
class Stream:
    """One request as its client sees it. `ended` is the instant its end became known; `status` is "" until then."""

    request: int
    arrival: Arrival
    num_tokens: int = 0
    stretches: list[Stretch] = field(default_factory=list)
    status: str = ""  # finished, rejected, cancelled or failed
    why: str = ""
    began: int = -1  # the instant its first step began
    ended: int = 0
    num_attempts: int = 0
    paired: bool = False  # its present attempt is on two workers
    rungs: dict[str, float] = field(default_factory=dict)  # seconds on each rung, over all workers that finished it

    def started(self, when: int) -> None:
        """A step begins to compute it; the first one counts."""
        if self.began < 0:
            self.began = when

    def append(self, first: int, stretch: Stretch) -> None:
        """Take in tokens numbered from `first`. Raises ValueError where one is lost or comes twice."""
        if first != self.num_tokens:
            raise ValueError(f"request {self.request} has {self.num_tokens} tokens and hears token {first}")
        self.num_tokens += stretch.num
        if self.stretches and self.stretches[-1].is_followed_by(stretch):
            last = self.stretches[-1]
            self.stretches[-1] = last._replace(num=last.num + stretch.num)
        else:
            self.stretches.append(stretch)

    def times(self) -> Iterator[float]:
        """When each token was written, in seconds."""
        for stretch in self.stretches:
            for index in range(stretch.num):
                yield seconds(stretch.token(index))
