"""Which two workers can hand KV to each other: all of them, but for those of whom one says that its connection is down.

Not responsible for connections (`serve/peers.py`), nor for who is the better of two (`router.py`).
"""

from collections.abc import Callable, Set
from typing import Protocol, TypeVar


class Named(Protocol):
    """Whatever stands for a worker."""

    name: str


W = TypeVar("W", bound=Named)
NONE: frozenset[tuple[str, str]] = frozenset()


class Links:
    """What every worker says of its connections to the others. Nothing said means that it stands."""

    def __init__(self) -> None:
        self._down: dict[str, set[str]] = {}

    def down(self, worker: str, peer: str) -> None:
        """A worker cannot reach a peer."""
        self._down.setdefault(worker, set()).add(peer)

    def up(self, worker: str, peer: str) -> None:
        """It can again."""
        peers = self._down.get(worker, set())
        peers.discard(peer)
        if not peers:
            self._down.pop(worker, None)

    def forget(self, worker: str) -> None:
        """A worker is gone: what it said, and what was said of it, is of no interest."""
        self._down.pop(worker, None)
        for other in list(self._down):
            self.up(other, worker)

    def stand(self, one: str, other: str) -> bool:
        """Neither says that it cannot reach the other."""
        return other not in self._down.get(one, ()) and one not in self._down.get(other, ())

    def best(
        self,
        firsts: list[W],
        seconds: list[W],
        pick: Callable[[list[W], W | None], W | None],
        without: Set[tuple[str, str]] = NONE,
    ) -> tuple[W, W] | None:
        """The best second that has a first connected to it, and the best of those; never one of the pairs `without`.

        `pick(firsts, second)` is the best first for a second, `pick(seconds, None)` the best second.
        """
        while second := pick(seconds, None):
            able = firsts
            if self._down or without:
                able = [f for f in firsts if self.stand(f.name, second.name) and (f.name, second.name) not in without]
            if first := pick(able, second):
                return first, second
            seconds = [other for other in seconds if other is not second]
        return None
