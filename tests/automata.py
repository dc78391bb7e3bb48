"""The policy objects as automata: a state is a number, and `react(state, event)` is looked up or tried out once.

What is tried out is the real thing: a copy of a `Worker` (with the little an executor knows) or of a `RouterDriver`
is fed the event. Two objects are the same state if they differ only in what no decision depends on: how time is
counted, how steps and reads are numbered, in which order free blocks lie, and stale entries of leases.

Not responsible for what is in memory or on its way: that is the world's (`explore.py`).
"""

from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cache
from types import FunctionType, MethodType
from typing import Any

from diptych.engine.executor import Sampling
from diptych.policy import messages
from diptych.policy.batching import WorkerSpec
from diptych.policy.blocks import State
from diptych.policy.books import RouterSpec
from diptych.policy.ladder import Ladder, Rung
from diptych.policy.messages import (
    Answer,
    Emit,
    Finish,
    PeerLost,
    Place,
    Pull,
    Purpose,
    Reason,
    Slice,
    StepDone,
    Submitted,
    Tick,
    WorkerEvent,
    WorkerOrder,
    WorkerUp,
    request_of,
)
from diptych.policy.router import Router
from diptych.policy.worker import Worker
from diptych.serve.router import RouterDriver
from diptych.serve.wire import Deliver, Ticket

Tag = int  # which token's KV: of a text, at a position
Table = tuple[int, ...]


class Violation(AssertionError):
    """A law does not hold."""


def law(holds: bool, why: str) -> None:
    """Raise Violation unless it holds."""
    if not holds:
        raise Violation(why)


# --- texts -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Texts:
    """Prompts and answers of the requests, by number. `shared`: they all are the same text."""

    lengths: tuple[tuple[int, int], ...]  # (prompt, answer)
    size: int
    shared: bool = False

    def tag(self, rid: int, position: int) -> Tag:
        """The token at a position, named so that different ones have different names."""
        return (0 if self.shared else request_of(rid)) * 100 + position + 1

    def hashes(self, rid: int, num_tokens: int) -> tuple[bytes, ...]:
        """Of the full blocks among so many tokens."""
        text = 0 if self.shared else request_of(rid)
        return tuple(bytes([text, i]) for i in range(num_tokens // self.size))


class Unkept(dict[Any, Any]):
    """Stands for books on which no decision depends, and in which two states would differ."""

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


class Unrecorded:
    """Stands for the records of requests, on which no decision depends: hears everything and keeps nothing."""

    name = ""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        pass

    def __call__(self, *said: Any) -> Any:
        return self


# --- copying and comparing -------------------------------------------------------------------------------------------

_ATOMS = (int, float, str, bytes, type(None), tuple, frozenset, Enum, type, FunctionType, WorkerSpec, Texts)
_UNSEEN = {
    "spec", "times", "since", "spent", "num_preempted", "num_freed", "_next_step", "_lease_s", "_beat_s", "_pulls",
    "num", "_clock", "order", "last_token", "sampling", "_ports", "_journal", "_spec", "_times", "_edges",
    "records", "record",
}  # fmt: skip
_UNORDERED = {"_by_hash", "_hash_of", "_keeps"}


@cache
def _is_atom(kind: type) -> bool:
    return issubclass(kind, _ATOMS) or kind.__module__ == messages.__name__


@cache
def _names(kind: type) -> tuple[str, ...]:
    return tuple(name for base in reversed(kind.__mro__) for name in getattr(base, "__slots__", ()))


def attributes(thing: Any) -> list[tuple[str, Any]]:
    """What an object is made of."""
    slots = [(name, getattr(thing, name)) for name in _names(type(thing)) if hasattr(thing, name)]
    return [*slots, *vars(thing).items()] if hasattr(thing, "__dict__") else slots


def clone(thing: Any, known: dict[int, Any]) -> Any:
    """A deep copy in which what was one object is one object again; facts are not copied."""
    kind: Any = type(thing)
    if _is_atom(kind):
        return thing
    if id(thing) in known:
        return known[id(thing)]
    if kind is array:
        return thing[:]
    if kind is set:
        return set(thing)
    if kind is MethodType:
        return MethodType(thing.__func__, clone(thing.__self__, known))
    if kind in (dict, OrderedDict):
        known[id(thing)] = copy = kind()
        for key, value in thing.items():
            copy[key] = clone(value, known)
    elif kind in (list, deque):
        known[id(thing)] = copy = kind()
        copy.extend([clone(value, known) for value in thing])
    else:
        known[id(thing)] = copy = kind.__new__(kind)
        for name, value in attributes(thing):
            object.__setattr__(copy, name, clone(value, known))
    return copy


def freeze(thing: Any, now: float, known: dict[int, int]) -> Any:
    """All that decisions depend on, as a value. Instants are counted from now."""
    kind: Any = type(thing)
    if kind is float:
        return thing - now
    if kind is array:
        return bytes(thing)
    if kind is set:
        return frozenset(thing)
    if kind is MethodType:
        return None
    if kind is Ladder:
        return thing.at
    if kind is tuple:
        return tuple([freeze(value, now, known) for value in thing])
    if _is_atom(kind):
        return thing
    if id(thing) in known:
        return ("again", known[id(thing)])
    known[id(thing)] = len(known)
    if kind in (dict, OrderedDict):
        return tuple([(key, freeze(value, now, known)) for key, value in thing.items()])
    if kind in (list, deque):
        return tuple([freeze(value, now, known) for value in thing])
    return tuple(
        tuple(sorted(value.items())) if name in _UNORDERED else freeze(value, now, known)
        for name, value in attributes(thing)
        if name not in _UNSEEN
    )


# --- a worker --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """The event that the step under way is done."""


@dataclass(frozen=True)
class Reading:
    """What a worker ordered to be read, and which tokens must be found in each block."""

    order: Pull
    expected: tuple[tuple[Tag, ...], ...]


@dataclass(frozen=True)
class Access:
    """A step reads the first `num_tokens` of an attempt, then writes those from there to `end`."""

    rid: int
    num_tokens: int
    end: int
    table: Table


@dataclass(frozen=True)
class Reaction:
    """What came of an event. `over`: what the step that is done relied on; `begun`: what the next one touches."""

    orders: tuple[WorkerOrder | Reading, ...]
    over: tuple[Access, ...]
    begun: tuple[Access, ...]


@dataclass(frozen=True)
class Glance:
    """What the world may see of a worker's state."""

    offered: frozenset[tuple[int, int]]  # (rid, block)
    fenced: frozenset[int]  # a read may write into these: reserved or quarantined
    free: frozenset[int]
    steps: bool
    ticks: bool
    empty: bool


class _Lowest:
    """Numbers reads: always the lowest number that no read has."""

    def __init__(self, worker: Worker):
        self.worker = worker

    def __next__(self) -> int:
        used = self.worker.sink._reads.keys() | self.worker.keep._reads.keys()
        return next(number for number in range(1, len(used) + 2) if number not in used)


class Station:
    """A worker, the clock it sees, and the block tables of its executor."""

    def __init__(self, spec: WorkerSpec, texts: Texts):
        self.worker = Worker(spec)
        self.worker.sink._pulls = self.worker.keep._pulls = _Lowest(self.worker)  # type: ignore[assignment]
        self.now = 0.0
        self.tables: dict[int, list[int]] = {}
        self.texts = texts

    def hear(self, event: WorkerEvent | Step) -> Reaction:
        """Feed the worker an event; time goes on only with ticks."""
        worker = self.worker
        worker.pool._free.sort(reverse=True)
        under_way = next(iter(worker._steps.values()), ())
        over: tuple[Access, ...] = ()
        if isinstance(event, Step):
            over = tuple(self._access(piece, 0) for piece in under_way)
            event = StepDone(next(iter(worker._steps)), 0.1, filled=self._filled(under_way))
            under_way = ()
        elif isinstance(event, Tick):
            self.now = max(self.now, worker.next_deadline() or 0.0)
        elif isinstance(event, Place):
            event = replace(event, hashes=self.texts.hashes(event.rid, event.num_tokens))
        offered, expected = set(worker.source._offers), set(worker.sink._incoming)
        orders = worker.on(self.now, event)
        self._hold_laws(orders, offered)
        for rid in expected - worker.sink._incoming.keys():
            if rid in worker.seqs and worker.seqs[rid].life.at == Rung.DECODING:  # not computed here: it was read
                said_ok = isinstance(event, Answer) and event.ok and event.rid == rid
                law(said_ok or isinstance(event, PeerLost), f"{rid} goes on with what it read, at {event}")
        begun = () if under_way or not worker._steps else self._begin(next(iter(worker._steps.values())))
        self.tables = {rid: table for rid, table in self.tables.items() if rid in worker.seqs}
        return Reaction(tuple(map(self._seen, orders)), over, begun)

    def glance(self) -> Glance:
        pool = self.worker.pool
        states = [
            frozenset(block for block, state in enumerate(pool._state) if state in wanted)
            for wanted in ({State.RESERVED, State.QUARANTINED}, {State.FREE})
        ]
        handed = {(rid, b) for rid, offer in self.worker.source._offers.items() for b in offer.blocks}
        copied = {
            (rid, b) for rid, batches in self.worker.copies._open.items() for batch in batches for b in batch.blocks
        }
        offered = frozenset(handed | copied)
        law(
            {block for _, block in offered} == {b for b, count in enumerate(pool._offers) if count},
            "offers do not add up",
        )
        ticks = self.worker.next_deadline() is not None
        return Glance(offered, *states, bool(self.worker._steps), ticks, not leftovers(self.worker))

    def settle(self) -> Hashable:
        """Forget what makes no difference; returns all that does."""
        worker = self.worker
        steps = dict(enumerate(worker._steps.values(), 1))
        worker._steps.clear()
        worker._steps.update(steps)
        worker._next_step = len(steps)
        worker.pool._free.sort(reverse=True)
        source = worker.source
        source._leases = sorted(lease for lease in source._leases if lease[1] in source._offers)
        sink = worker.sink
        sink._early_until = deque(wait for wait in sink._early_until if wait[1] in sink._early)
        worker.next_deadline()  # forgets stale leases of what is kept and copied
        known: dict[int, int] = {}
        return freeze(worker, self.now, known), freeze(self.tables, self.now, known)

    def _hold_laws(self, orders: Sequence[WorkerOrder], offered: set[int]) -> None:
        pool = self.worker.pool
        try:
            pool.check()
        except AssertionError as broken:
            raise Violation(f"blocks are not conserved: {broken}") from broken
        law(pool.balanced(), "blocks are not conserved")
        for order in orders:
            if isinstance(order, Answer) and order.ok:
                law(order.rid in offered, f"ok is said to {order.rid}, whose blocks were free before")

    def _begin(self, slices: tuple[Slice, ...]) -> tuple[Access, ...]:
        """The executor begins a step: nobody else may use what it writes."""
        pool, size = self.worker.pool, self.worker.pool.block_size
        for piece in slices:
            if piece.admit:
                self.tables[piece.rid] = []
            table = self.tables[piece.rid]
            table += piece.blocks
            law({pool._state[b] for b in table} <= {State.HELD, State.OFFERED}, f"{piece} uses blocks it does not hold")
            for position in range(piece.start, piece.start + piece.count):
                block = table[position // size]
                law(pool._refs[block] == 1 and not pool._offers[block], f"{piece} writes block {block} under others")
        return tuple(self._access(piece, piece.count) for piece in slices)

    def _access(self, piece: Slice, count: int) -> Access:
        """Of a step that begins, what it reads and writes; of one that is over (count 0), all that must be there."""
        end = piece.start + piece.count
        return Access(piece.rid, end - count, end, tuple(self.tables[piece.rid]))

    def _filled(self, slices: tuple[Slice, ...]) -> tuple[tuple[int, bytes], ...]:
        filled = []
        for piece in slices:
            known = len(self.worker.seqs[piece.rid].hashes)
            filled += [
                (piece.rid, digest) for digest in self.texts.hashes(piece.rid, piece.start + piece.count)[known:]
            ]
        return tuple(filled)

    def _seen(self, order: WorkerOrder) -> WorkerOrder | Reading:
        if isinstance(order, Finish):
            return replace(order, rungs=())
        if not isinstance(order, Pull):
            return order
        size = self.worker.pool.block_size
        limit = size * (order.first + len(order.source))
        if order.purpose == Purpose.HANDOVER:
            limit = min(limit, self.worker.seqs[order.rid].num_tokens)
        expected = tuple(
            tuple(self.texts.tag(order.rid, at) for at in range(i * size, min((i + 1) * size, limit)))
            for i in range(order.first, order.first + len(order.source))
        )
        return Reading(order, expected)


def leftovers(worker: Worker) -> dict[str, Any]:
    """What an idle worker must not have."""
    counts = worker.pool.counts()
    left = {
        "seqs": worker.seqs, "claims": worker.claims, "running": worker.running, "steps": worker._steps,
        "early": worker.sink._early, "incoming": worker.sink._incoming, "reads": worker.sink._reads,
        "unread": worker.sink._unread, "offers": worker.source._offers, "kept": worker.keep._kept,
        "replicas": worker.keep._reads, "copies": worker.copies.rids, "successors": worker._successors,
        "blocks": {state: n for state, n in counts.items() if n and state not in ("free", "cached")},
    }  # fmt: skip
    return {what: value for what, value in left.items() if value}


# --- the router ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Said:
    """All that a worker reports after one event."""

    worker: str
    orders: tuple[Emit | Finish, ...]


@dataclass(frozen=True)
class Lost:
    """A worker's connection to the router is over."""

    worker: str


@dataclass(frozen=True)
class Gone:
    """A client wants its answer no more."""

    request: int


@dataclass(frozen=True)
class Opening:
    """All workers are up, and all requests come in."""


class _Gate:
    """The ports of the router's driver: what it sends, and what clients have."""

    def __init__(self, texts: Texts):
        self.sent: list[tuple[str, Any]] = []
        self.num_tokens: dict[int, int] = {}
        self.texts = texts

    def send(self, worker: str, order: Any, attachment: bytes) -> None:
        self.sent.append((worker, order))

    def deliver(self, client: Any, message: Deliver, attachment: bytes) -> None:
        have = self.num_tokens[message.request] = self.num_tokens.get(message.request, 0) + message.count
        if message.reason in (Reason.STOP, Reason.LENGTH):
            law(have == self.texts.lengths[message.request][1], f"request {message.request} ends with {have} tokens")


class Front:
    """The router's driver and its policy, with all requests handed in."""

    def __init__(self, spec: RouterSpec, cluster: Sequence[WorkerSpec], texts: Texts):
        self.gate = _Gate(texts)
        self.driver = RouterDriver(Router(spec), self.gate, _midnight, None, records=Unrecorded())  # type: ignore[arg-type]
        self.driver.moved = Unkept()
        self._cluster = tuple(cluster)
        self._texts = texts

    def hear(self, event: Opening | Said | Lost | Gone | WorkerUp) -> tuple[tuple[str, Any], ...]:
        """Feed the driver an event; returns what it sends to whom."""
        match event:
            case Opening():
                self._open()
            case Said():
                for order in event.orders:
                    count = order.count if isinstance(order, Emit) else 0
                    self.driver.heard(event.worker, order, bytes(4 * count))
            case Lost():
                self.driver.worker_lost(event.worker)
            case Gone():
                self.driver.cancel(event.request)
            case WorkerUp():
                self.driver.worker_up(event)
        return self._sent()

    def _open(self) -> None:
        for spec in self._cluster:
            self.driver.worker_up(WorkerUp(spec.name, 0, spec.role, spec.num_blocks, spec.block_size))
        for request, (num_prompt, max_new) in enumerate(self._texts.lengths):
            hashes = self._texts.hashes(messages.attempt_id(request, 0), num_prompt)
            ticket = Ticket(bytes(4 * num_prompt), num_prompt, Sampling(), b"")
            self.driver.submit("client", Submitted(request, num_prompt, max_new, hashes), ticket)

    def settle(self) -> Hashable:
        """Forget what makes no difference; returns all that does."""
        router = self.driver.policy
        views = sorted(router.workers.values(), key=lambda view: view.last_placed)
        for rank, view in enumerate(views, 1):
            view.last_placed = rank
        router._clock = max(len(views), *(view.order for view in router.requests.values()), 0)
        self.gate.num_tokens = {n: have for n, have in self.gate.num_tokens.items() if n in self.driver._open}
        return freeze(self.driver, 0.0, {})

    def _sent(self) -> tuple[tuple[str, Any], ...]:
        law(self.driver.num_broken == 0, "a stream lost or repeated a token")
        router = self.driver.policy
        ended = sum(router.num.values()) - router.num["submitted"]
        law(router.num["submitted"] == len(router.requests) + ended, f"requests are not conserved: {router.num}")
        law(router.requests.keys() == self.driver._open.keys(), "policy and driver disagree about who is in flight")
        sent, self.gate.sent = tuple(self.gate.sent), []
        return tuple((to, replace(o, order=request_of(o.rid)) if isinstance(o, Place) else o) for to, o in sent)


def _midnight() -> float:
    return 0.0


# --- automata --------------------------------------------------------------------------------------------------------


class Automaton:
    """States of objects of one kind, by number. Number 0 is a new one. `look` is what others may see of a state."""

    def __init__(self, new: Any, look: Callable[[Any], Any]):
        self._things: list[Any] = []
        self._numbers: dict[Hashable, int] = {}
        self._reactions: list[dict[Any, tuple[int, Any] | Violation]] = []
        self._look = look
        self.seen: list[Any] = []
        self.number(new)

    def __len__(self) -> int:
        return len(self._things)

    def react(self, state: int, event: Any) -> tuple[int, Any]:
        """The next state, and what came of it. Raises Violation."""
        known = self._reactions[state].get(event)
        if known is None:
            known = self._reactions[state][event] = self._try(state, event)
        if isinstance(known, Violation):
            raise Violation(*known.args)
        return known

    def number(self, thing: Any) -> int:
        """The number of a state, which is new or known."""
        value = thing.settle()
        number = self._numbers.get(value)
        if number is None:
            number = self._numbers[value] = len(self._things)
            self._things.append(thing)
            self._reactions.append({})
            self.seen.append(self._look(thing))
        return number

    def _try(self, state: int, event: Any) -> tuple[int, Any] | Violation:
        thing = clone(self._things[state], {})
        try:
            reaction = thing.hear(event)
        except Violation as broken:
            return broken
        except Exception as broken:
            return Violation(f"{type(broken).__name__}: {broken} (at {event})")
        return self.number(thing), reaction


def station(spec: WorkerSpec, texts: Texts) -> Automaton:
    """A worker's automaton; what is seen of a state is a `Glance`."""
    return Automaton(Station(spec, texts), Station.glance)


def front(spec: RouterSpec, cluster: Sequence[WorkerSpec], texts: Texts) -> Automaton:
    """The router's automaton; what is seen of a state is the requests in flight."""
    return Automaton(Front(spec, cluster, texts), lambda thing: tuple(thing.driver._open))
