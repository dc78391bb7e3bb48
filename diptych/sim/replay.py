"""Replay: a journal's events, fed to a fresh object, must give the orders that were recorded.

Not responsible for reading files (`journal.py`) or for producing events of its own (`driver.py`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from diptych.journal import Recording
from diptych.policy.messages import Message
from diptych.policy.router import Router
from diptych.policy.worker import Worker


@dataclass(frozen=True, slots=True)
class Outcome:
    """What replaying one object's journal showed. `difference` is None where all decisions are the same."""

    num_events: int
    num_orders: int
    difference: str | None = None


def fresh(recording: Recording) -> Any:
    """A new policy object as the recorded one was at its start."""
    header = recording.header
    return Worker(header.worker) if header.worker is not None else Router(header.router)


def replay(recording: Recording) -> Outcome:
    """Feed every event to a fresh object; stops at the first difference."""
    policy = fresh(recording)
    num_events = num_orders = 0
    for now, event, recorded in recording:
        orders = policy.on(now, event)
        num_events += 1
        num_orders += len(recorded)
        if orders != recorded:
            where = f"event {num_events} at {now:.6f} s, {event}"
            return Outcome(num_events, num_orders, f"{where}:\n  {_first_difference(recorded, orders)}")
    return Outcome(num_events, num_orders)


def _first_difference(recorded: list[Message], orders: list[Message]) -> str:
    for then, now in _pairs(recorded, orders):
        if then != now:
            return f"recorded {then}\n  replayed {now}"
    return "no difference"


def _pairs(recorded: list[Message], orders: list[Message]) -> Iterator[tuple[Message | None, Message | None]]:
    for i in range(max(len(recorded), len(orders))):
        yield (recorded[i] if i < len(recorded) else None), (orders[i] if i < len(orders) else None)
