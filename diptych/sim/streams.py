"""What the clients of a simulated cluster see: tokens and when they came, kept as stretches rather than one by one.

Not responsible for statistics (`report.py`).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from diptych.sim.agenda import seconds
from diptych.sim.costs import elapsed
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


@dataclass(slots=True)
class Stream:
    """One request as its client sees it. `ended` is the instant its end became known; `status` is "" until then."""

    request: int
    arrival: Arrival
    num_tokens: int = 0
    stretches: list[Stretch] = field(default_factory=list)
    status: str = ""  # finished, rejected, cancelled or failed
    why: str = ""
    ended: int = 0
    num_attempts: int = 0
    paired: bool = False  # its present attempt is on two workers
    rungs: dict[str, float] = field(default_factory=dict)  # seconds on each rung, over all workers that finished it

    def append(self, first: int, stretch: Stretch) -> None:
        """Take in tokens numbered from `first`. Raises ValueError where one is lost or comes twice."""
        if first != self.num_tokens:
            raise ValueError(f"request {self.request} has {self.num_tokens} tokens and hears token {first}")
        self.num_tokens += stretch.num
        last = self.stretches[-1] if self.stretches else None
        if last and stretch.growth == last.growth and stretch.started == last.token(last.num - 1):
            if stretch.first == last.first + last.num * last.growth:  # goes on where the last one ended
                self.stretches[-1] = last._replace(num=last.num + stretch.num)
                return
        self.stretches.append(stretch)

    def times(self) -> Iterator[float]:
        """When each token was written, in seconds."""
        for stretch in self.stretches:
            for index in range(stretch.num):
                yield seconds(stretch.token(index))
