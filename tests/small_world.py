"""A cluster of two or three workers in which anything may happen next: the states that `explore.py` looks at.

A state is a tuple of small integers: the states of the policy objects (`automata.py`), what is on its way, which reads
are under way, and which token's KV is in which slot of which block. `Space.follow` says what can happen next.

Laws, beside those of `automata.py`:
- what a read or a step finds is what it expects, unless the reader's lease had ended; and then it is not used;
- blocks that a peer reads stay offered until it has ended or its lease has;
- blocks that a read may write into stay reserved or quarantined until it has settled.

Not responsible for which states are looked at.
"""

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from automata import Access, Gone, Lost, Opening, Reading, Said, Step, Texts, Violation, front, law, station

from diptych.policy.batching import WorkerSpec
from diptych.policy.books import RouterSpec
from diptych.policy.messages import (
    Beat,
    CancelPull,
    Emit,
    Finish,
    Offer,
    PeerLost,
    Pull,
    Read,
    ReadFailed,
    Run,
    Settled,
    Tick,
    WorkerUp,
)  # fmt: skip

GARBAGE = -1
ROUTER = -1
DEAD = -1
GOING, CANCELLED, FAILED = range(3)


class Budget(NamedTuple):
    """How often each thing that need not happen may happen in one run. `haste`: a lease or beat is due early."""

    cancels: int = 0
    failures: int = 0
    deaths: int = 0
    cuts: int = 0
    doubles: int = 0
    losses: int = 0
    haste: int = 0


@dataclass(frozen=True)
class Scope:
    """What is explored. `requests`: (prompt, answer) in tokens. `kinds`: which messages may be doubled or lost."""

    cluster: tuple[WorkerSpec, ...]
    requests: tuple[tuple[int, int], ...]
    budget: Budget
    shared: bool = False
    attempts: int = 3
    revive: bool = False
    kinds: tuple[str, ...] = ()
    quick: bool = True  # part of what the command explores when it is not told what


class Numbers:
    """Values by number, so that a state is a tuple of small integers."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._numbers: dict[Hashable, int] = {}

    def number(self, value: Hashable) -> int:
        number = self._numbers.get(value)
        if number is None:
            number = self._numbers[value] = len(self.values)
            self.values.append(value)
        return number


class Transfer(NamedTuple):
    """A read. `fenced`: its source must stay as it is. `gone`: its source's process, or the way to it, is no more."""

    reader: int
    pull: int
    plan: int  # number of a Reading
    status: int
    fenced: bool
    gone: bool


World = tuple[int, ...]
Label = tuple[str, ...]
Act = Callable[["Move"], None]
Choice = tuple[Label, bool, Act]  # bool: it must be able to happen
Pages = tuple[tuple[int, ...], ...]  # of one worker: for each block, for each slot, whose KV it is (0: nobody's)


class Space:
    """All states of one scope: the first, and what can follow a state."""

    def __init__(self, scope: Scope):
        self.scope = scope
        self.size = scope.cluster[0].block_size
        self.texts = Texts(scope.requests, self.size, scope.shared)
        self.front = front(RouterSpec(), scope.cluster, self.texts)
        self.stations = [station(spec, self.texts) for spec in scope.cluster]
        self.names = [spec.name for spec in scope.cluster]
        self.index = {name: i for i, name in enumerate(self.names)}
        ends = [ROUTER, *range(len(self.names))]
        self.ways = [(a, b) for a in ends for b in ends if a != b]
        self.way = {ends: i for i, ends in enumerate(self.ways)}
        self.said = Numbers()  # messages
        self.plans = Numbers()
        self.pages = Numbers()
        self.channels = Numbers()
        self.reads = Numbers()
        self.cuts = Numbers()
        self.budgets = Numbers()
        self.trying: Label = ()  # what is looked at just now

    def first(self) -> World:
        """Everybody is up, and all requests have come in."""
        move = Move(self, None)
        move.tell_router(Opening())
        return move.pack()

    def is_empty(self, world: World) -> bool:
        """All is over, and nothing is held or on its way."""
        move = Move(self, world)
        homes = (state == DEAD or self.stations[i].seen[state].empty for i, state in enumerate(move.stations))
        return not (any(move.channels) or move.reads or self.front.seen[move.router]) and all(homes)

    def follow(self, world: World) -> Iterator[tuple[Label, bool, World]]:
        """All that can happen next: what it is called, whether it must be able to happen, what comes of it."""
        must = False
        for label, needed, act in self._choices(world):
            must |= needed
            yield label, needed, self._after(world, act, label)
        move = Move(self, world)
        for i, state in enumerate(move.stations):
            if state != DEAD and self.stations[i].seen[state].ticks and not self._beats(move, i):
                label = ("early tick" if must else "tick", self.names[i])
                if not must:
                    yield label, True, self._after(world, partial(Move.tell, i=i, event=Tick()), label)
                elif move.budget.haste:
                    yield label, False, self._after(world, partial(Move.hasten, i=i), label)

    def _after(self, world: World, act: Act, label: Label) -> World:
        self.trying = label
        move = Move(self, world)
        act(move)
        return move.pack()

    def _beats(self, move: "Move", i: int) -> bool:
        """A beat of this worker is on its way; another one says nothing new."""
        return any(
            isinstance(self.said.values[number], Beat)
            for way, channel in zip(self.ways, move.channels, strict=True)
            if way[0] == i
            for number in channel
        )

    def _choices(self, world: World) -> Iterator[Choice]:
        move = Move(self, world)
        yield from self._messages(move)
        yield from self._transfers(move)
        for i, state in enumerate(move.stations):
            if state != DEAD and self.stations[i].seen[state].steps:
                yield ("step", self.names[i]), True, partial(Move.tell, i=i, event=Step())
        yield from self._misfortunes(move)

    def _messages(self, move: "Move") -> Iterator[Choice]:
        for way, channel in enumerate(move.channels):
            if not channel:
                continue
            head = self.said.values[channel[0]]
            told = (*(self.names[end] if end >= 0 else "router" for end in self.ways[way]), str(head))
            yield ("deliver", *told), True, partial(Move.deliver, way=way)
            ends = [k for k, number in enumerate(channel) if isinstance(self.said.values[number], PeerLost | Lost)]
            if ends and ends[0]:
                yield ("cut short", *told), False, partial(Move.cut_short, way=way, count=ends[0])
            if type(head).__name__ in self.scope.kinds:
                if move.budget.doubles:
                    yield ("double", *told), False, partial(Move.double, way=way)
                if move.budget.losses:
                    yield ("lose", *told), False, partial(Move.lose, way=way)

    def _transfers(self, move: "Move") -> Iterator[Choice]:
        for k, read in enumerate(move.reads):
            told = (self.names[read.reader], str(read.pull))
            if read.status == GOING and not read.gone:
                yield ("read", *told), True, partial(Move.read, k=k)
            if read.status == GOING and (read.gone or move.budget.failures):
                yield ("fail", *told), read.gone, partial(Move.fail, k=k)
            if read.status != GOING:
                yield ("settle", *told), True, partial(Move.settle, k=k)
            if read.status == CANCELLED and not read.gone:
                yield ("late read", *told), False, partial(Move.late, k=k)

    def _misfortunes(self, move: "Move") -> Iterator[Choice]:
        budget = move.budget
        if budget.cancels:
            for request in self.front.seen[move.router]:
                yield ("cancel", str(request)), False, partial(Move.cancel, request=request)
        for i, state in enumerate(move.stations):
            if state != DEAD and budget.deaths:
                yield ("die", self.names[i]), False, partial(Move.die, i=i)
            if state == DEAD and self.scope.revive and not self._mourned(move, i):
                yield ("revive", self.names[i]), False, partial(Move.revive, i=i)
        for a in range(len(self.names)):
            for b in range(a):
                if (a, b) not in move.cuts and budget.cuts and DEAD not in (move.stations[a], move.stations[b]):
                    yield ("cut", self.names[a], self.names[b]), False, partial(Move.cut, a=a, b=b)
                if (a, b) in move.cuts and not move.ends(a, b) and not move.ends(b, a):
                    yield ("mend", self.names[a], self.names[b]), False, partial(Move.mend, a=a, b=b)

    def _mourned(self, move: "Move", i: int) -> bool:
        """Somebody has still to hear of that death."""
        return any(move.ends(i, other) for other in (ROUTER, *range(len(self.names))) if other != i)


def named(order: Pull) -> set[tuple[int, int]]:
    """What a read reads, as its source names it."""
    return {(order.rid, block) for block in order.source}


class Move:
    """One event: what it does to a state. Made from one, it becomes the next."""

    def __init__(self, space: Space, world: World | None):
        self.space = space
        n = len(space.names)
        if world is None:
            self.router = 0
            self.stations = [0] * n
            blank = [tuple((0,) * space.size for _ in range(spec.num_blocks)) for spec in space.scope.cluster]
            self.pages: list[Pages] = list(blank)
            self.channels: list[tuple[int, ...]] = [()] * len(space.ways)
            self.reads: list[Transfer] = []
            self.cuts: frozenset[tuple[int, int]] = frozenset()
            self.budget = space.scope.budget
            return
        self.router = world[0]
        self.stations = list(world[1 : 1 + n])
        self.pages = [space.pages.values[number] for number in world[1 + n : 1 + 2 * n]]
        self.channels = list(space.channels.values[world[-4]])
        self.reads = list(space.reads.values[world[-3]])
        self.cuts = space.cuts.values[world[-2]]
        self.budget = space.budgets.values[world[-1]]

    def pack(self) -> World:
        """The state as it is now."""
        space = self.space
        return (
            self.router,
            *self.stations,
            *(space.pages.number(pages) for pages in self.pages),
            space.channels.number(tuple(self.channels)),
            space.reads.number(tuple(sorted(self.reads))),
            space.cuts.number(self.cuts),
            space.budgets.number(self.budget),
        )

    # --- messages

    def deliver(self, way: int) -> None:
        """The next message of a channel arrives."""
        number, *rest = self.channels[way]
        self.channels[way] = tuple(rest)
        self._hand_over(way, number)

    def cut_short(self, way: int, count: int) -> None:
        """The connection ended before these messages got through."""
        self.channels[way] = self.channels[way][count:]

    def double(self, way: int) -> None:
        """The next message arrives, and will arrive again."""
        self.budget = self.budget._replace(doubles=self.budget.doubles - 1)
        self._hand_over(way, self.channels[way][0])

    def lose(self, way: int) -> None:
        """The next message never arrives, though the connection holds."""
        self.budget = self.budget._replace(losses=self.budget.losses - 1)
        self.channels[way] = self.channels[way][1:]

    def _hand_over(self, way: int, number: int) -> None:
        sender, receiver = self.space.ways[way]
        event = self.space.said.values[number]
        if receiver == ROUTER:
            self.tell_router(event)
        elif self.stations[receiver] != DEAD:
            self.tell(receiver, event)

    def post(self, sender: int, receiver: int, message: Any) -> None:
        """Send something."""
        way = self.space.way[sender, receiver]
        self.channels[way] = (*self.channels[way], self.space.said.number(message))

    def post_all(self, sent: tuple[tuple[str, Any], ...]) -> None:
        """What the router sends; to a dead worker it is lost."""
        for name, order in sent:
            if self.stations[self.space.index[name]] != DEAD:
                self.post(ROUTER, self.space.index[name], order)

    def ends(self, sender: int, receiver: int) -> bool:
        """The receiver has still to hear that the connection is over."""
        channel = self.channels[self.space.way[sender, receiver]]
        return any(isinstance(self.space.said.values[number], PeerLost | Lost) for number in channel)

    def _send(self, sender: int, order: Any) -> None:
        """To a peer: one that is gone, or that one is not connected to, is reported as lost, again if need be."""
        peer = self.space.index[order.peer]
        cut = (max(sender, peer), min(sender, peer)) in self.cuts
        if self.stations[peer] != DEAD and not cut:
            if isinstance(order, Offer):
                return  # it changes nothing: whether and when it comes makes no difference
            self.post(sender, peer, replace(order, peer=self.space.names[sender]))
        elif not self.ends(peer, sender):
            self.post(peer, sender, PeerLost(order.peer))

    # --- the objects

    def tell_router(self, event: Any) -> None:
        """The router hears something."""
        self.router, sent = self.space.front.react(self.router, event)
        self.post_all(sent)

    def tell(self, i: int, event: Any) -> None:
        """A worker hears something, and what it orders is done."""
        self.stations[i], reaction = self.space.stations[i].react(self.stations[i], event)
        for access in reaction.over:
            self._find(i, access, access.end, "has written")
        reports = []
        for order in reaction.orders:
            match order:
                case Run():
                    pass
                case Reading():
                    self._start(i, order)
                case CancelPull(pull=pull):
                    self._stop(i, pull)
                case Emit() | Finish():
                    reports.append(order)
                case _:
                    self._send(i, order)
        if reports:
            self.post(i, ROUTER, Said(self.space.names[i], tuple(reports)))
        self._hold_fences(i, event)
        for access in reaction.begun:
            self._begin(i, access)
        self._forget(i)

    def hasten(self, i: int) -> None:
        """What a worker waits for until then comes too late."""
        self.budget = self.budget._replace(haste=self.budget.haste - 1)
        self.tell(i, Tick())

    def _hold_fences(self, i: int, event: Any) -> None:
        """What is read stays offered, unless a lease ended; what is written into stays fenced."""
        glance = self.space.stations[i].seen[self.stations[i]]
        for k, read in enumerate(self.reads):
            order = self.space.plans.values[read.plan].order
            if read.reader == i:
                law(glance.fenced.issuperset(order.target), f"{self.space.names[i]} frees what {order} may write into")
            elif read.fenced and self.space.index[order.peer] == i and not glance.offered.issuperset(named(order)):
                over = isinstance(event, Tick | PeerLost)
                law(over, f"{self.space.names[i]} frees what {order} reads, at {event}")
                self.reads[k] = read._replace(fenced=False)

    # --- steps and pages

    def _begin(self, i: int, access: Access) -> None:
        """A step reads what is there, and writes."""
        self._find(i, access, access.num_tokens, "relies on")
        fenced = {
            block
            for read in self.reads
            for order in (self.space.plans.values[read.plan].order,)
            for block in (order.target if read.reader == i else order.source if read.fenced else ())
            if read.reader == i or self.space.index[order.peer] == i
        }
        pages = [list(page) for page in self.pages[i]]
        for position in range(access.num_tokens, access.end):
            block = access.table[position // self.space.size]
            law(block not in fenced, f"{self.space.names[i]}: {access} writes {block}, which is being read")
            pages[block][position % self.space.size] = self.space.texts.tag(access.rid, position)
        self.pages[i] = tuple(map(tuple, pages))

    def _find(self, i: int, access: Access, num_tokens: int, verb: str) -> None:
        for position in range(num_tokens):
            block = access.table[position // self.space.size]
            found = self.pages[i][block][position % self.space.size]
            wanted = self.space.texts.tag(access.rid, position)
            if found != wanted:
                name = self.space.names[i]
                raise Violation(f"{name}: {access.rid} {verb} {wanted} at {position} and finds {found}")

    def _write(self, i: int, blocks: tuple[int, ...], content: Any) -> None:
        pages = list(self.pages[i])
        for block, page in zip(blocks, content, strict=True):
            pages[block] = page
        self.pages[i] = tuple(pages)

    def _spoil(self, read: Transfer) -> None:
        """A read that is not wanted writes something until it has settled."""
        target = self.space.plans.values[read.plan].order.target
        self._write(read.reader, target, [(GARBAGE,) * self.space.size] * len(target))

    def _forget(self, i: int) -> None:
        """What was in a free block matters to nobody, unless somebody reads it all the same."""
        free = self.space.stations[i].seen[self.stations[i]].free
        touched: set[int] = set()
        for read in self.reads:
            order = self.space.plans.values[read.plan].order
            touched.update(order.target if read.reader == i else order.source)
        blank = tuple(block for block in free - touched if any(self.pages[i][block]))
        self._write(i, blank, [(0,) * self.space.size] * len(blank))

    # --- reads

    def _start(self, i: int, reading: Reading) -> None:
        order, space = reading.order, self.space
        peer = space.index[order.peer]
        law(all((read.reader, read.pull) != (i, order.pull) for read in self.reads), f"{order} again")
        state = self.stations[peer]
        gone = state == DEAD or (max(i, peer), min(i, peer)) in self.cuts
        fenced = not gone and space.stations[peer].seen[state].offered.issuperset(named(order))
        self.reads.append(Transfer(i, order.pull, space.plans.number(reading), GOING, fenced, gone))

    def _stop(self, i: int, pull: int) -> None:
        for k, read in enumerate(self.reads):
            if (read.reader, read.pull) == (i, pull):
                self.reads[k] = read._replace(status=FAILED if read.status == FAILED else CANCELLED)
                self._spoil(read)

    def read(self, k: int) -> None:
        """The last byte lands, and checksums are compared."""
        read = self.reads[k]
        reading = self.space.plans.values[read.plan]
        pages = self.pages[self.space.index[reading.order.peer]]
        content = [pages[block] for block in reading.order.source]
        whole = all(
            page[: len(wanted)] == wanted for page, wanted in zip(content, reading.expected, strict=True)
        )  # fmt: skip
        law(whole or not read.fenced, f"{reading.order} found other KV")
        self._write(read.reader, reading.order.target, content)
        if whole:
            del self.reads[k]
            self.tell(read.reader, Read(read.pull, 1, 0.1))
        else:
            self._fail(k)

    def fail(self, k: int) -> None:
        """A read does not succeed."""
        if not self.reads[k].gone:
            self.budget = self.budget._replace(failures=self.budget.failures - 1)
        self._fail(k)

    def _fail(self, k: int) -> None:
        read = self.reads[k] = self.reads[k]._replace(status=FAILED)
        self._spoil(read)
        self.tell(read.reader, ReadFailed(read.pull, "failed"))

    def settle(self, k: int) -> None:
        """Nothing of a read can land any more."""
        read = self.reads[k]
        self._spoil(read)
        del self.reads[k]
        self.tell(read.reader, Settled(read.pull))

    def late(self, k: int) -> None:
        """A read was complete before it heard that it should stop."""
        read = self.reads.pop(k)
        self.tell(read.reader, Read(read.pull, 1, 0.1))

    # --- misfortunes

    def cancel(self, request: int) -> None:
        """A client leaves."""
        self.budget = self.budget._replace(cancels=self.budget.cancels - 1)
        self.tell_router(Gone(request))

    def die(self, i: int) -> None:
        """A worker's process is gone, and with it what it reads; everybody will hear so."""
        space = self.space
        self.budget = self.budget._replace(deaths=self.budget.deaths - 1)
        self.stations[i] = DEAD
        self.pages[i] = tuple((0,) * space.size for _ in self.pages[i])
        self.reads = [read for read in self.reads if read.reader != i]
        self._lose_sources({(other, i) for other in range(len(space.names))})
        self.cuts = frozenset(cut for cut in self.cuts if i not in cut)
        for way, (sender, receiver) in enumerate(space.ways):
            if receiver == i:
                self.channels[way] = ()
            elif sender == i and receiver == ROUTER:
                self.post(i, ROUTER, Lost(space.names[i]))
            elif sender == i and self.stations[receiver] != DEAD and not self.ends(i, receiver):
                self.post(i, receiver, PeerLost(space.names[i]))

    def revive(self, i: int) -> None:
        """A new process takes its place, and is connected to everybody."""
        self.stations[i] = 0
        spec = self.space.scope.cluster[i]
        self.post(i, ROUTER, WorkerUp(spec.name, 0, spec.role, spec.num_blocks, spec.block_size))

    def cut(self, a: int, b: int) -> None:
        """The connection between two workers ends; both live."""
        self.budget = self.budget._replace(cuts=self.budget.cuts - 1)
        self.cuts |= {(a, b)}
        self._lose_sources({(a, b), (b, a)})
        for here, there in ((a, b), (b, a)):
            if not self.ends(here, there):
                self.post(here, there, PeerLost(self.space.names[here]))

    def mend(self, a: int, b: int) -> None:
        """They are connected again."""
        self.cuts -= {(a, b)}

    def _lose_sources(self, ways: set[tuple[int, int]]) -> None:
        """These readers cannot read from these sources any more."""
        for k, read in enumerate(self.reads):
            if (read.reader, self.space.index[self.space.plans.values[read.plan].order.peer]) in ways:
                self.reads[k] = read._replace(gone=True, fenced=False)
