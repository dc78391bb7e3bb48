"""The closed loop: the simulator lives through a recorded run again, with the measured durations as its costs.

`replay.py` feeds an object what it heard. Here nothing is fed but the requests and the cancels from outside: every
other event is made by the simulator's own driver out of what the objects order. What is taken from the record is how
long each step, read and message took. If both drivers do the same with the same orders, every object decides the same;
so this shows that the simulator is the server, but for its costs.

Not for runs in which workers died, joined, left or lost sight of each other, or in which timers fired. Not
responsible for reading journals (`journal.py`).
"""

import contextlib
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from diptych.errors import ConfigError
from diptych.journal import Recording
from diptych.policy.membership import Drain, LinkDown, LinkMeasured
from diptych.policy.messages import (
    MAX_ATTEMPTS,
    Answer,
    Beat,
    Cancel,
    Cancelled,
    Done,
    Drop,
    Emit,
    Failed,
    Finish,
    Message,
    Offer,
    PeerLost,
    Place,
    Progress,
    Publish,
    Pull,
    Read,
    ReadFailed,
    Reason,
    Revoke,
    Run,
    Settled,
    StepDone,
    Submitted,
    Tick,
    WorkerLost,
    WorkerUp,
    request_of,
)
from diptych.policy.retention import Release, Replicate, Replicated
from diptych.sim.agenda import instant
from diptych.sim.conditions import ClientGone
from diptych.sim.costs import Costs, Link
from diptych.sim.driver import Simulation, Stuck
from diptych.sim.machine import Machine
from diptych.sim.router import ROUTER

_ENDS = (WorkerLost, PeerLost, LinkDown, Drain)  # with which a shutdown begins
PEER_MESSAGES = (Offer, Publish, Done, Answer, Revoke, Drop, Beat, Replicate, Replicated, Release)
_AFTER_S = 1e-9
Entry = tuple[float, Message, list[Message]]
Pair = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Recorded:
    """A request as it was recorded. Stands in for `workload.Arrival`."""

    time_s: float
    num_prompt: int
    max_new: int
    output_len: int
    hashes: tuple[bytes, ...]
    priority: int
    written: tuple[bytes, ...]  # hashes of the full blocks after those of the prompt

    def text_hash(self, index: int) -> bytes:
        """The hash of a full block of its text, prompt or answer; of what was cancelled the record may have none."""
        known = self.hashes + self.written
        return known[index] if index < len(known) else b""


class RecordedSteps:
    """A worker's steps, each as long as it was."""

    def __init__(self, durations: Iterable[float]):
        self._durations = deque(durations)

    def step(self, num_new: int, context: int) -> int:
        """The next one's, in femtoseconds; one that was never finished takes for ever."""
        return max(instant(self._durations.popleft()), 1) if self._durations else instant(1e9)

    def growth(self, num_decodes: int) -> int | None:
        """Unknown: steps are not taken in bulk."""
        return None


class RecordedConditions:
    """Every message as late as it was; what nobody noticed the arrival of comes at once."""

    def __init__(self, delays: dict[Pair, deque[float]]):
        self._delays = delays

    def message_s(self, sender: str, receiver: str) -> float:
        """The next message of this pair."""
        delays = self._delays.get((sender, receiver))
        return delays.popleft() if delays else 0.0

    def read_error(self, reader: str, pull: Pull) -> str:
        """Not asked: reads end as they did (`RecordedReads`)."""
        return ""

    def settle_s(self, reader: str, pull: Pull) -> float | None:
        """Not asked either."""
        return None


class RecordedReads:
    """Reads that end as they did, and when they did."""

    def __init__(self, simulation: Simulation, outcomes: dict[tuple[str, int], list[tuple[float, Any]]]):
        self.num_bytes = 0
        self._simulation = simulation
        self._outcomes = outcomes

    def start(self, machine: Machine, order: Pull) -> None:
        """Put the recorded end of this read on the agenda."""
        agenda = self._simulation.agenda
        for delay_s, event in self._outcomes.get((machine.spec.name, order.pull), []):
            when = agenda.now + instant(delay_s)
            agenda.at(when, self._simulation.rank, self._simulation.tell, machine, event)

    def cancel(self, machine: Machine, pull: int) -> None:
        """What came of it is in the record."""

    def lose(self, machine: Machine) -> None:
        """Nobody dies here."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """The decisions of one object, recorded and made again. `difference` None: all of them are the same."""

    object: str
    num_decisions: int
    difference: str | None = None


def rerun(recordings: Sequence[Recording]) -> list[Comparison]:
    """Live through a run again and compare every object's decisions; ConfigError for a run that cannot be."""
    record = Record(recordings)
    made: dict[str, list[Message]] = defaultdict(list)

    def observe(now: float, name: str, event: Message, orders: Sequence[Message]) -> None:
        if now <= record.end_s:  # leases that the record did not live to see end are no decisions of it
            made[name] += orders

    simulation = Simulation(
        [record.headers[name].worker for name in record.workers],
        record.headers[ROUTER].router,
        Costs(
            per_worker={name: RecordedSteps(record.step_durations(name)) for name in record.workers},
            kv_bytes_per_token=record.token_bytes,
        ),
        Link(),
        record.arrivals(),  # type: ignore[arg-type]  # Recorded stands in for Arrival
        conditions=RecordedConditions(record.delays()),
        happenings=record.cancels(),
        observer=observe,
        bulk=False,
        num_events=10 * record.num_events + 1000,
    )
    simulation.reads = RecordedReads(simulation, record.reads())  # type: ignore[assignment]
    with contextlib.suppress(Stuck):  # decisions went apart somewhere, and the comparison says where
        simulation.run()
    return [_compare(name, record.decisions(name), made[name]) for name in (ROUTER, *record.workers)]


class Record:
    """A recorded run, taken apart into what the simulator needs."""

    def __init__(self, recordings: Sequence[Recording]):
        if len({recording.header.object for recording in recordings}) < len(recordings):
            raise ConfigError("a worker was restarted in this run; only runs without deaths can be lived through again")
        self.headers: dict[str, Any] = {recording.header.object: recording.header for recording in recordings}
        if ROUTER not in self.headers:
            raise ConfigError("the router's journal is missing; give the whole journal folder")
        entries = {recording.header.object: list(recording) for recording in recordings}
        ends = [t for log in entries.values() for t, event, _ in log if isinstance(event, _ENDS)]
        end = min(ends, default=float("inf"))  # from here on it is the shutdown
        self._log: dict[str, list[Entry]] = {name: [e for e in log if e[0] < end] for name, log in entries.items()}
        if any(isinstance(event, Tick) and orders for log in self._log.values() for _, event, orders in log):
            raise ConfigError("timers fired in this run (leases were extended); record one with a longer lease")
        self.num_events = sum(map(len, self._log.values()))
        router = self._log[ROUTER]
        ups = [event for _, event, _ in router if isinstance(event, WorkerUp)]
        self.workers = [up.worker for up in ups]
        self.token_bytes = max((up.token_bytes for up in ups), default=0)
        self._submitted = [(t, event) for t, event, _ in router if isinstance(event, Submitted)]
        if not self._submitted:
            raise ConfigError("nothing was asked in this run")
        self._numbers = {event.request: i for i, (_, event) in enumerate(self._submitted)}
        self._begin = self._submitted[0][0] - 1.0
        self.end_s = max(log[-1][0] for log in self._log.values() if log) - self._begin + 1.0
        places = [order for _, _, orders in router for order in orders if isinstance(order, Place)]
        self._cancelled = {event.request: t for t, event, _ in router if isinstance(event, Cancelled)}
        self._first = {place.rid: place.num_tokens - place.num_prompt for place in places}  # each attempt's first token

    def arrivals(self) -> list[Recorded]:
        """The requests, in order."""
        written: dict[int, list[bytes]] = defaultdict(list)
        lengths: dict[int, int] = defaultdict(int)
        stopped: set[int] = set()
        for _, event, orders in self._all(StepDone):
            for rid, digest in event.filled:
                if digest not in written[request_of(rid)]:
                    written[request_of(rid)].append(digest)
            for order in orders:
                if isinstance(order, Emit):
                    number = request_of(order.rid)
                    lengths[number] = max(lengths[number], order.first + order.count)
                elif isinstance(order, Finish) and order.reason == Reason.STOP:
                    stopped.add(request_of(order.rid))
        return [
            Recorded(
                when - self._begin,
                event.num_prompt,
                event.max_new,
                lengths[event.request] if event.request in stopped else event.max_new,
                event.hashes,
                event.priority,
                tuple(written[event.request]),
            )
            for when, event in self._submitted
        ]

    def cancels(self) -> list[ClientGone]:
        """The clients that left."""
        return [
            ClientGone(when - self._begin, self._numbers[event.request])
            for when, event, _ in self._log[ROUTER]
            if isinstance(event, Cancelled)
        ]

    def step_durations(self, worker: str) -> list[float]:
        """How long each of a worker's steps took, from when it could begin."""
        ordered: dict[int, float] = {}
        durations = []
        last = 0.0
        for now, event, orders in self._log[worker]:
            if isinstance(event, StepDone):
                durations.append(now - max(ordered[event.step], last))
                last = now
            ordered |= {order.step: now for order in orders if isinstance(order, Run)}
        return durations

    def reads(self) -> dict[tuple[str, int], list[tuple[float, Any]]]:
        """How each read ended, and how long after it was ordered."""
        outcomes: dict[tuple[str, int], list[tuple[float, Any]]] = defaultdict(list)
        for worker in self.workers:
            ordered: dict[int, float] = {}
            for now, event, orders in self._log[worker]:
                if isinstance(event, Read | ReadFailed | Settled):
                    outcomes[worker, event.pull].append((now - ordered[event.pull], event))
                ordered |= {order.pull: now for order in orders if isinstance(order, Pull)}
        return outcomes

    def delays(self) -> dict[Pair, deque[float]]:
        """For every pair, how long each message took, in the order in which they were sent."""
        found: dict[Pair, deque[float]] = defaultdict(deque)
        arrived = self._arrivals_of_messages()
        for name, log in self._log.items():
            for now, _, orders in log:
                for order in orders:
                    if isinstance(order, LinkMeasured):  # of its own, and before what else is reported
                        found[name, ROUTER].append(self._delay(arrived, name, ROUTER, order, now))
                reports = [order for order in orders if isinstance(order, Emit | Finish)]
                if reports:  # one frame
                    times = [t for o in reports if (t := self._take(arrived, name, ROUTER, o)) is not None]
                    found[name, ROUTER].append(max(min(times, default=self._unheard(reports)) - now, 0.0))
                for order in orders:
                    if isinstance(order, Place | Cancel):
                        found[name, order.worker].append(self._delay(arrived, name, order.worker, order, now))
                    elif isinstance(order, PEER_MESSAGES):
                        found[name, order.peer].append(self._delay(arrived, name, order.peer, order, now))
        return found

    def decisions(self, name: str) -> list[Message]:
        """Everything an object ordered, with requests numbered as the simulator does."""
        return [self._renumber(order) for _, _, orders in self._log[name] for order in orders]

    def _all(self, kind: type) -> Iterable[tuple[float, Any, list[Message]]]:
        for worker in self.workers:
            yield from (entry for entry in self._log[worker] if isinstance(entry[1], kind))

    def _arrivals_of_messages(self) -> dict[Any, deque[float]]:
        """When each message was heard, by (receiver, what it says)."""
        found: dict[Any, deque[float]] = defaultdict(deque)
        for name, log in self._log.items():
            for now, event, _ in log:
                if isinstance(event, Progress):
                    found[name, "first", event.rid].append(now)
                elif isinstance(event, Finish | Failed):
                    found[name, event.worker, event.rid].append(now)
                elif isinstance(event, (Place, Cancel, LinkMeasured, *PEER_MESSAGES)):
                    found[name, event].append(now)
        return found

    def _unheard(self, reports: Iterable[Emit | Finish]) -> float:
        """When a report came of which policy heard nothing, though it should have: after its client had left."""
        told = [r for r in reports if isinstance(r, Finish) or r.first == self._first[r.rid]]
        left = [self._cancelled.get(request_of(report.rid)) for report in told]
        return max((when + _AFTER_S for when in left if when is not None), default=0.0)

    def _take(self, arrived: dict[Any, deque[float]], sender: str, receiver: str, order: Any) -> float | None:
        match order:
            case Emit():
                is_first = order.first == self._first[order.rid]
                key: Any = (receiver, "first", order.rid) if is_first else None
            case Finish():
                key = (receiver, order.worker, order.rid)
            case Place() | Cancel() | LinkMeasured():
                key = (receiver, order)
            case _:
                key = (receiver, replace(order, peer=sender))
        times = arrived.get(key)
        return times.popleft() if times else None

    def _delay(self, arrived: dict[Any, deque[float]], sender: str, receiver: str, order: Any, now: float) -> float:
        when = self._take(arrived, sender, receiver, order)
        return 0.0 if when is None else max(when - now, 0.0)

    def _renumber(self, order: Any) -> Any:
        changed: dict[str, Any] = {}
        for field in fields(order):
            value = getattr(order, field.name)
            if field.name == "rid":
                changed["rid"] = self._rid(value)
            elif field.name == "rids":
                changed["rids"] = tuple(map(self._rid, value))
            elif field.name == "request":
                changed["request"] = self._numbers[value]
            elif field.name == "slices":
                changed["slices"] = tuple(piece._replace(rid=self._rid(piece.rid)) for piece in value)
        return replace(order, **changed)

    def _rid(self, rid: int) -> int:
        return self._numbers[request_of(rid)] * MAX_ATTEMPTS + rid % MAX_ATTEMPTS


def _compare(name: str, recorded: list[Message], made: list[Message]) -> Comparison:
    for i in range(max(len(recorded), len(made))):
        then = _timeless(recorded[i]) if i < len(recorded) else None
        now = _timeless(made[i]) if i < len(made) else None
        if then != now:
            return Comparison(name, len(recorded), f"decision {i + 1}: recorded {then}\n  simulated {now}")
    return Comparison(name, len(recorded))


def _timeless(order: Message) -> Message:
    """A Finish reports durations, which differ by rounding."""
    return replace(order, rungs=()) if isinstance(order, Finish) else order
