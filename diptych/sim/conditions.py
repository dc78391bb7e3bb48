"""What may go wrong in a simulated cluster, who comes and goes, and how messages are delayed: from calm to rough.

Not responsible for what policies make of it.
"""

from dataclasses import dataclass
from math import inf
from random import Random
from typing import Protocol

from diptych.policy.batching import WorkerSpec
from diptych.policy.messages import Pull


@dataclass(frozen=True, slots=True)
class ClientGone:
    """A client hangs up on its request (numbered by arrival)."""

    time_s: float
    request: int


@dataclass(frozen=True, slots=True)
class WorkerDies:
    """A worker's process ends; after `back_after_s` a fresh one takes its place (None: never)."""

    time_s: float
    worker: str
    back_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class WorkerJoins:
    """A worker that was not there at the start comes up."""

    time_s: float
    spec: WorkerSpec


@dataclass(frozen=True, slots=True)
class WorkerDrains:
    """An operator takes a worker out of service; what is left there after `timeout_s` goes on elsewhere."""

    time_s: float
    worker: str
    timeout_s: float = inf


@dataclass(frozen=True, slots=True)
class LinkBreaks:
    """Two workers that live lose their connection; after `back_after_s` they have one again (None: never)."""

    time_s: float
    one: str
    other: str
    back_after_s: float | None = None


Happening = ClientGone | WorkerDies | WorkerJoins | WorkerDrains | LinkBreaks


class Conditions(Protocol):
    """Asked by the driver whenever chance has a say. Delivery stays in order for each (sender, receiver)."""

    def message_s(self, sender: str, receiver: str) -> float:
        """Seconds this message takes."""
        ...

    def read_error(self, reader: str, pull: Pull) -> str:
        """Asked when the last byte of a read would land: why it fails, or ""."""
        ...

    def settle_s(self, reader: str, pull: Pull) -> float | None:
        """Seconds from asking a read to stop until it has; None: it cannot be stopped and runs to its end."""
        ...


class Calm:
    """Constant delays; nothing fails."""

    def __init__(self, message_s: float, settle_s: float):
        self._message_s = message_s
        self._settle_s = settle_s

    def message_s(self, sender: str, receiver: str) -> float:
        """Always the same."""
        return self._message_s

    def read_error(self, reader: str, pull: Pull) -> str:
        """Reads succeed."""
        return ""

    def settle_s(self, reader: str, pull: Pull) -> float | None:
        """Always the same."""
        return self._settle_s


class Rough:
    """Random delays up to `message_s`, reads that fail with probability `read_failure`, cancels that come too late."""

    def __init__(self, seed: int, message_s: float, settle_s: float, read_failure: float = 0.0):
        self._random = Random(seed)
        self._message_s = message_s
        self._settle_s = settle_s
        self._read_failure = read_failure

    def message_s(self, sender: str, receiver: str) -> float:
        """Often none, else anything up to the most."""
        return 0.0 if self._random.random() < 0.3 else self._random.random() * self._message_s

    def read_error(self, reader: str, pull: Pull) -> str:
        """A checksum does not fit."""
        return "checksum" if self._random.random() < self._read_failure else ""

    def settle_s(self, reader: str, pull: Pull) -> float | None:
        """At once, later, or not before its end."""
        chance = self._random.random()
        return None if chance < 0.2 else 0.0 if chance < 0.5 else chance * self._settle_s
