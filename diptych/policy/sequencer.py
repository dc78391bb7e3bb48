"""Puts what the two halves of a pair say about one attempt into order.

Each worker speaks to the router over its own connection, so the decode side's tokens can overtake the first one, which
the prefill side sends. Both drivers of the router, live and simulated, hold back what came too early. Not responsible
for attempts that are not the present one: their sequencer is thrown away with them.
"""

from bisect import insort
from math import inf
from typing import Generic, TypeVar

from diptych.policy.messages import WELL, Emit, Finish

T = TypeVar("T")


class Sequencer(Generic[T]):
    """`first`: the number of the attempt's first token. What a driver attaches to a message comes back with it."""

    __slots__ = ("_ahead", "_next")

    def __init__(self, first: int):
        self._next = first
        self._ahead: list[tuple[Emit | Finish, T]] = []

    def take(self, message: Emit | Finish, attached: T) -> list[tuple[Emit | Finish, T]]:
        """Everything whose turn it is now. Raises ValueError for tokens that were taken before."""
        if isinstance(message, Finish) and message.reason not in WELL:
            return [(message, attached)]  # says nothing of tokens
        if _position(message) < self._next:
            raise ValueError(f"token {_position(message)} again, {self._next} is next")
        if any(_position(waiting[0]) == _position(message) for waiting in self._ahead):
            raise ValueError(f"token {_position(message)} twice, before {self._next} came")
        insort(self._ahead, (message, attached), key=lambda waiting: _position(waiting[0]))
        ready: list[tuple[Emit | Finish, T]] = []
        while self._ahead and _position(self._ahead[0][0]) in (self._next, inf):
            head, attached = self._ahead.pop(0)
            ready.append((head, attached))
            self._next += head.count if isinstance(head, Emit) else 0
        if self._ahead and _position(self._ahead[0][0]) < self._next:
            raise ValueError(f"token {_position(self._ahead[0][0])} twice, {self._next} is next")
        return ready


def _position(message: Emit | Finish) -> float:
    """Where in the answer a message belongs; the end comes after every token."""
    return message.first if isinstance(message, Emit) else inf
