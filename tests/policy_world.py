"""Helpers of the policy and simulator tests: a witness of every law, and random worlds to hold them in.

`Witness` watches a simulation event by event. It models the memory that policies only talk about: each slot of each
block remembers which token's KV was last written there, so a page that is lost, stale, overwritten or read too early
is noticed when somebody relies on it. It is the simulation's `Conditions` as well, because a read copies pages at the
moment its last byte lands.
"""

import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from random import Random
from typing import Any

from diptych.policy.batching import WorkerSpec
from diptych.policy.blocks import State
from diptych.policy.books import RouterSpec
from diptych.policy.messages import (
    CancelPull,
    Emit,
    Message,
    PeerLost,
    Place,
    Pull,
    Purpose,
    Role,
    Run,
    Settled,
    StepDone,
    Tick,
    request_of,
)
from diptych.policy.worker import Worker
from diptych.sim.conditions import ClientGone, Happening, LinkBreaks, Rough, WorkerDies, WorkerDrains, WorkerJoins
from diptych.sim.costs import Costs, Link, StepCost
from diptych.sim.driver import ROUTER, SimResult, Simulation
from diptych.sim.workload import Arrival, block_hash

Tag = tuple[bytes, int]
GARBAGE: Tag = (b"garbage", 0)
Pick = Callable[[int, int], int]  # a random integer between two, both included


# --- worlds ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """Everything a simulation needs, drawn at random. `calm`: nothing that excuses a failed request may happen."""

    cluster: tuple[WorkerSpec, ...]
    router: RouterSpec
    link: Link
    arrivals: tuple[Arrival, ...]
    happenings: tuple[Happening, ...]
    seed: int
    message_s: float
    settle_s: float
    read_failure: float
    costs: Costs

    @property
    def workers(self) -> tuple[WorkerSpec, ...]:
        """All that are ever there."""
        return (*self.cluster, *(h.spec for h in self.happenings if isinstance(h, WorkerJoins)))

    @property
    def calm(self) -> bool:
        """No deaths, every drain has the time it takes, and messages are quick compared with leases."""
        hurried = any(isinstance(h, WorkerDrains) and h.timeout_s < inf for h in self.happenings)
        broken = any(isinstance(h, WorkerDies | LinkBreaks) for h in self.happenings)
        return not (hurried or broken) and min(spec.lease_s for spec in self.workers) > 20 * self.message_s

    def rough(self) -> Rough:
        """Its conditions, anew."""
        return Rough(self.seed, self.message_s, self.settle_s, self.read_failure)


TOPOLOGIES = ("m", "mm", "mmm", "pd", "ppd", "pdd", "ppdd", "pdm", "pdmm", "pddm")
_ROLE = {"m": Role.MIXED, "p": Role.PREFILL, "d": Role.DECODE}


def draw_world(pick: Pick, quiet: bool = False) -> World:
    """A world out of random integers. `quiet`: nothing dies and no read fails."""

    def choose(*options: Any) -> Any:
        return options[pick(0, len(options) - 1)]

    size = choose(4, 1, 2, 3, 8, 16)
    topology = choose(*TOPOLOGIES)
    cluster = tuple(_draw_worker(pick, f"{kind}{i}", _ROLE[kind], size) for i, kind in enumerate(topology))
    smallest = min(spec.num_blocks for spec in cluster) * size
    arrivals = _draw_arrivals(pick, size, smallest if pick(0, 4) else smallest + 8)
    happenings: list[Happening] = [
        ClientGone(pick(0, 400) / 1000, pick(0, len(arrivals) - 1)) for _ in range(pick(0, 3))
    ]
    happenings += _draw_moves(pick, cluster, size, quiet)
    if not quiet:
        happenings += _draw_deaths(pick, cluster)
    return World(
        cluster,
        RouterSpec(choose("prefix-aware", "least-loaded", "round-robin"), choose(4096, 4), choose(8, 0, 1000)),
        Link(choose(1e6, 2e4, 2e3), choose(0.0, 0.003), choose("source", "pair", "all")),
        arrivals,
        tuple(happenings),
        seed=pick(0, 1 << 20),
        message_s=choose(0.0, 0.001, 0.02, 0.2),
        settle_s=choose(0.0, 0.01, 0.1),
        read_failure=0.0 if quiet else choose(0.0, 0.2),
        costs=Costs(StepCost(0.01, 0.001, 0.0001), kv_bytes_per_token=64),
    )


def draw_squeezed_world(pick: Pick) -> World:
    """Pairs whose decode side holds one request and little more: answers and KV that arrives slowly compete."""
    world = draw_world(pick, quiet=True)
    size = 1 << pick(0, 2)
    arrivals = []
    now = 0.0
    for stem in range(pick(3, 9)):
        now += pick(0, 30) / 1000
        num_prompt, max_new = pick(1, 24), pick(2, 30)
        hashes = tuple(block_hash(stem, i) for i in range(num_prompt // size))
        arrivals.append(Arrival(now, num_prompt, max_new, pick(1, max_new), hashes, pick(-1, 1), stem))
    need = max(-(-(arrival.num_prompt + arrival.max_new) // size) for arrival in arrivals)
    cluster = tuple(
        WorkerSpec(
            f"{kind}{i}", _ROLE[kind], block_size=size, depth=pick(1, 2), chunk=(None, 2, 8)[pick(0, 2)],
            num_blocks=3 * need if kind == "p" else need + pick(0, 3),
        )
        for i, kind in enumerate(("pd", "ppd", "pdd")[pick(0, 2)])
    )  # fmt: skip
    link = Link((1e5, 3e4, 1e4)[pick(0, 2)], (0.0, 0.003)[pick(0, 1)], "source")
    quick = min(world.message_s, 0.01)
    return replace(world, cluster=cluster, arrivals=tuple(arrivals), link=link, message_s=quick, happenings=())


def _draw_worker(pick: Pick, name: str, role: Role, size: int) -> WorkerSpec:
    num_blocks = pick(2, 14) if size > 2 else pick(8, 40)
    return WorkerSpec(
        name,
        role,
        num_blocks=num_blocks * (3 if role == Role.PREFILL else 1),  # where memory is short is where answers grow
        block_size=size,
        chunk=(None, 1, 3, 8, 24)[pick(0, 4)],
        max_batch=(256, 1, 2, 3)[pick(0, 3)],
        itl_budget_s=(None, None, 0.02)[pick(0, 2)],
        lease_s=(30.0, 5.0, 0.3, 0.05)[pick(0, 3)],
        depth=pick(1, 2),
    )


def _draw_arrivals(pick: Pick, size: int, longest: int) -> tuple[Arrival, ...]:
    """Requests of up to `longest` tokens in all: long prompts with short answers, or the other way round."""
    arrivals = []
    now = 0.0
    hurry, talkative = pick(0, 1), pick(0, 1)
    for stem in range(pick(1, 9)):
        now += pick(0, 5 if hurry else 60) / 1000
        num_prompt = pick(1, max(longest // 4 if talkative else longest - 1, 1))
        silent = pick(0, 5) == 5  # writes nothing
        max_new = 0 if silent else pick(1, max(min(longest - num_prompt, 40 if talkative else 12), 1))
        output_len = max_new if silent or pick(0, 1) else pick(1, max_new)
        shared = min(pick(0, 3) * 2, num_prompt // size)
        group = 1 << 63 | pick(0, 1)
        blocks = range(num_prompt // size)
        hashes = tuple(block_hash(group if i < shared else stem, i) for i in blocks)
        arrivals.append(Arrival(now, num_prompt, max_new, output_len, hashes, pick(-1, 1), stem))
    return tuple(arrivals)


def _draw_deaths(pick: Pick, cluster: Sequence[WorkerSpec]) -> list[Happening]:
    backs = (None, 0.0, 0.01, 0.2)
    return [
        WorkerDies(pick(0, 400) / 1000, cluster[pick(0, len(cluster) - 1)].name, backs[pick(0, 3)])
        for _ in range(max(pick(-1, 2), 0))
    ]


def _draw_moves(pick: Pick, cluster: Sequence[WorkerSpec], size: int, quiet: bool) -> list[Happening]:
    """Workers that join and drain while requests come; unless `quiet`, also drains in a hurry and broken links."""
    moves: list[Happening] = []
    if pick(0, 2) == 0:
        kind = "mpd"[pick(0, 2)]
        moves.append(WorkerJoins(pick(0, 300) / 1000, _draw_worker(pick, f"{kind}9", _ROLE[kind], size)))
    names = [spec.name for spec in cluster] + [move.spec.name for move in moves if isinstance(move, WorkerJoins)]
    for _ in range(max(pick(-2, 2), 0)):
        timeout_s = inf if quiet else (inf, 0.0, 0.05)[pick(0, 2)]
        moves.append(WorkerDrains(pick(0, 400) / 1000, names[pick(0, len(names) - 1)], timeout_s))
    if not quiet and len(names) > 1:
        for _ in range(max(pick(-2, 2), 0)):
            one, other = pick(0, len(names) - 1), pick(0, len(names) - 2)
            other += other >= one
            backs = (None, 0.0, 0.02, 0.2)
            moves.append(LinkBreaks(pick(0, 400) / 1000, names[one], names[other], backs[pick(0, 3)]))
    return moves


# --- the witness -----------------------------------------------------------------------------------------------------


@dataclass
class Memory:
    """The pages of one process, and what its executor knows."""

    pages: list[list[Tag | None]]
    tables: dict[int, list[int]] = field(default_factory=dict)
    steps: deque[Run] = field(default_factory=deque)  # the first is being computed


@dataclass
class PendingRead:
    """A read that may still touch memory on both sides."""

    reader: str
    order: Pull
    source: tuple[str, int]  # worker and incarnation


class Witness:
    """Watches one simulation; raises AssertionError at the first event that breaks a law."""

    def __init__(self, world: World):
        self.world = world
        self.simulation: Simulation | None = None
        self._rough = world.rough()
        self._memory: dict[tuple[str, int], Memory] = {}
        self._reads: dict[tuple[str, int, int], PendingRead] = {}  # reader, incarnation, pull
        self._places: dict[int, Place] = {}
        self._open: dict[str, set[int]] = {}  # offers of each worker after its latest event
        self._expired: set[tuple[str, int]] = set()
        self._size = world.cluster[0].block_size

    # --- conditions

    def message_s(self, sender: str, receiver: str) -> float:
        return self._rough.message_s(sender, receiver)

    def settle_s(self, reader: str, pull: Pull) -> float | None:
        return self._rough.settle_s(reader, pull)

    def read_error(self, reader: str, pull: Pull) -> str:
        """The last byte lands: copy the pages, and compare them as checksums would."""
        pending = self._reads[self._read_key(reader, pull.pull)]
        target = self._of(reader).pages
        source = self._memory[pending.source].pages
        why = self._rough.read_error(reader, pull)
        whole = True
        for offset, (origin, block) in enumerate(zip(pull.source, pull.target, strict=True)):
            target[block] = [GARBAGE] * self._size if why else list(source[origin])
            whole &= self._holds(source[origin], pull, pull.first + offset)
        if not whole:
            assert (pull.peer, pull.rid) in self._expired or not self._live(reader, pull), f"{pull} found other KV"
            return "checksum"
        return why

    def _live(self, reader: str, pull: Pull) -> bool:
        worker = self._worker(reader)
        if pull.purpose == Purpose.REPLICA:
            return worker.keep._reads[pull.pull].kept is not None
        reading = worker.sink._reads.get(pull.pull)
        return reading is not None and reading.live

    def _holds(self, page: list[Tag | None], pull: Pull, index: int) -> bool:
        known = self._size
        if pull.purpose == Purpose.HANDOVER:
            known = min(known, self._places[pull.rid].num_tokens - index * self._size)
        return page[:known] == [self._tag(pull.rid, index * self._size + i) for i in range(known)]

    # --- observer

    def __call__(self, now: float, name: str, event: Message, orders: Sequence[Message]) -> None:
        if name == ROUTER:
            self._watch_router(orders)
            return
        worker = self._worker(name)
        worker.pool.check()
        assert worker.pool.balanced()
        self._watch_leases(name, event)
        self._settle(name, event)
        if isinstance(event, StepDone):
            self._end_step(name, event, orders)
        self._watch_orders(name, orders)
        self._watch_idleness(worker)

    def _watch_router(self, orders: Sequence[Message]) -> None:
        router = self._sim.router
        assert router.num["submitted"] == len(router.requests) + sum(router.num.values()) - router.num["submitted"]
        for order in orders:
            if isinstance(order, Place):
                self._places[order.rid] = order
                role = self._sim.machines[order.worker].spec.role
                alone = (order.part, order.peer, role != Role.DECODE) == (Role.PREFILL, "", True)
                assert alone == (order.max_new == 0), f"{order} on a {role} worker"
        self._watch_books()

    def _watch_books(self) -> None:
        """What the router thinks it gave each worker is what it gave it and has not got back."""
        router = self._sim.router
        for name, view in router.workers.items():
            here = [r for r in router.requests.values() if name in (r.prefill, r.decode)]
            held = [r.submitted for r in here if r.decode == name]
            assert view.num_requests == len(here), (name, view)
            assert view.held_tokens == sum(s.num_prompt + s.max_new for s in held), (name, view)
            charged = [r.uncached for r in router.requests.values() if r.charged == name]
            assert view.prompt_tokens == sum(charged), (name, view)

    def _watch_leases(self, name: str, event: Message) -> None:
        worker = self._worker(name)
        now_open = worker.source._offers.keys() | worker.copies.rids
        if isinstance(event, Tick | PeerLost):
            self._expired |= {(name, rid) for rid in self._open.get(name, set()) - now_open}
        self._open[name] = now_open

    def _settle(self, name: str, event: Message) -> None:
        if isinstance(event, Settled):
            pending = self._reads.pop(self._read_key(name, event.pull))
            for block in pending.order.target:  # the last moment at which it may have written
                self._of(name).pages[block] = [GARBAGE] * self._size
        elif type(event).__name__ == "Read":
            del self._reads[self._read_key(name, event.pull)]  # type: ignore[union-attr]

    def _watch_orders(self, name: str, orders: Sequence[Message]) -> None:
        for order in orders:
            match order:
                case Run():
                    steps = self._of(name).steps
                    steps.append(order)
                    if len(steps) == 1:
                        self._begin_step(name)
                case Pull():
                    peer = self._sim.machines[order.peer]
                    pending = PendingRead(name, order, (order.peer, peer.incarnation))
                    self._reads[self._read_key(name, order.pull)] = pending
                    states = {self._worker(name).pool._state[block] for block in order.target}
                    assert states <= {State.RESERVED, State.QUARANTINED}, states
                case CancelPull(pull=pull):
                    for block in self._reads[self._read_key(name, pull)].order.target:
                        self._of(name).pages[block] = [GARBAGE] * self._size

    def _watch_idleness(self, worker: Worker) -> None:
        """A worker with work and room computes."""
        if worker._steps:
            return
        for seq in worker.running:
            grows = seq.decodes and seq.num_computed == len(seq.blocks) * self._size
            able = seq.wants and seq.behind >= 1 and not (grows and worker.pool.num_available == 0)
            assert not able, f"{worker.spec.name} idles though {seq.rid} could be computed"
        assert worker.idle_reason()
        if worker.claims and not worker.running:
            seq = worker.claims[0]
            coming = worker.sink.get(seq.rid)
            need = coming.lacks if coming else worker.pool.blocks_for(seq.num_tokens)
            assert need > worker.pool.num_available, f"{worker.spec.name} idles though {seq.rid} has room"

    # --- steps

    def _begin_step(self, name: str) -> None:
        memory, pool = self._of(name), self._worker(name).pool
        fenced = self._fenced(name)
        for piece in memory.steps[0].slices:
            if piece.admit:
                memory.tables[piece.rid] = []
            table = memory.tables[piece.rid]
            table += piece.blocks
            self._expect(name, piece.rid, piece.start, "relies on")
            assert {pool._state[block] for block in table} <= {State.HELD, State.OFFERED}, (name, piece)
            for position in range(piece.start, piece.start + piece.count):
                block = table[position // self._size]
                assert pool._refs[block] == 1 and pool._offers[block] == 0, f"{name}: {piece} writes shared {block}"
                assert block not in fenced, f"{name}: {piece} writes {block}, which is being read"
                memory.pages[block][position % self._size] = self._tag(piece.rid, position)

    def _end_step(self, name: str, event: StepDone, orders: Sequence[Message]) -> None:
        memory = self._of(name)
        run = memory.steps.popleft()
        assert run.step == event.step and event.count == 1
        emits = {order.rid: order for order in orders if isinstance(order, Emit)}
        for piece in run.slices:
            self._expect(name, piece.rid, piece.start + piece.count, "wrote")
            emit = emits.pop(piece.rid, None)
            if emit is not None:
                assert piece.sample and emit.count == 1
                assert emit.first == piece.start + piece.count - self._places[piece.rid].num_prompt
                assert self._places[piece.rid].max_new > 0, f"{piece.rid} was to write nothing"
        assert not emits
        if memory.steps:
            self._begin_step(name)

    def _expect(self, name: str, rid: int, num_tokens: int, verb: str) -> None:
        memory = self._of(name)
        table = memory.tables[rid]
        for position in range(num_tokens):
            found = memory.pages[table[position // self._size]][position % self._size]
            wanted = self._tag(rid, position)
            assert found == wanted, f"{name}: {rid} {verb} {wanted} at {position} and finds {found}"

    def _fenced(self, name: str) -> set[int]:
        """Our blocks that somebody may still read or that a read may still write."""
        blocks: set[int] = set()
        process = (name, self._sim.machines[name].incarnation)
        for (reader, incarnation, _), pending in self._reads.items():
            reads = self._sim.machines[reader].alive and self._sim.machines[reader].incarnation == incarnation
            if reads and pending.source == process and (name, pending.order.rid) not in self._expired:
                blocks.update(pending.order.source)
            if (reader, incarnation) == process:
                blocks.update(pending.order.target)
        return blocks

    # --- the end

    def check_end(self, result: SimResult) -> None:
        """Everything submitted has ended, and everything taken was given back."""
        assert not self._sim.router.requests, f"in flight for ever: {list(self._sim.router.requests)}"
        assert not self._sim.router.drains, "a worker was told to drain and is still there"
        for stream in result.streams:
            assert stream.status, stream
            if stream.status == "finished":
                assert stream.num_tokens == stream.arrival.output_len, stream
            if self.world.calm:
                assert stream.status != "failed", stream
        for machine in self._sim.machines.values():
            if machine.alive:
                check_empty(machine.worker)

    # --- small things

    @property
    def _sim(self) -> Simulation:
        assert self.simulation is not None
        return self.simulation

    def _worker(self, name: str) -> Worker:
        return self._sim.machines[name].worker

    def _of(self, name: str) -> Memory:
        machine = self._sim.machines[name]
        key = (name, machine.incarnation)
        if key not in self._memory:
            self._memory[key] = Memory([[None] * self._size for _ in range(machine.spec.num_blocks)])
        return self._memory[key]

    def _read_key(self, name: str, pull: int) -> tuple[str, int, int]:
        return name, self._sim.machines[name].incarnation, pull

    def _tag(self, rid: int, position: int) -> Tag:
        arrival = self.world.arrivals[request_of(rid)]
        return arrival.text_hash(position // self._size), position % self._size


def check_empty(worker: Worker) -> None:
    """Nothing is left on an idle worker; every block is free or cached."""
    worker.pool.check()
    counts = worker.pool.counts()
    assert counts["free"] + counts["cached"] == worker.pool.num_blocks, (worker.spec.name, counts)
    left = {
        "seqs": worker.seqs, "claims": worker.claims, "running": worker.running, "steps": worker._steps,
        "early": worker.sink._early, "incoming": worker.sink._incoming, "reads": worker.sink._reads,
        "unread": worker.sink._unread, "offers": worker.source._offers, "kept": worker.keep._kept,
        "replicas": worker.keep._reads, "copies": worker.copies.rids, "successors": worker._successors,
    }  # fmt: skip
    assert not any(left.values()), (worker.spec.name, {what: value for what, value in left.items() if value})


def run_world(world: World, witness: bool = True, bulk: bool = False) -> SimResult:
    """Run a world, watched."""
    watch = Witness(world)
    simulation = Simulation(
        world.cluster, world.router, world.costs, world.link, world.arrivals,
        conditions=watch if witness else world.rough(),
        happenings=world.happenings,
        observer=watch if witness else None,
        bulk=bulk,
        num_events=20_000,
    )  # fmt: skip
    watch.simulation = simulation
    result = simulation.run()
    if witness:
        watch.check_end(result)
    return result


def main(first: int, last: int) -> None:
    """Run many worlds, of each kind; say which break a law."""
    for seed in range(first, last):
        pick = Random(seed).randint
        try:
            run_world(draw_squeezed_world(pick) if seed % 4 == 3 else draw_world(pick, quiet=seed % 2 == 0))
        except Exception as broken:
            print(f"seed {seed}: {type(broken).__name__}: {str(broken)[:300]}")
    print(f"{last - first} worlds")


if __name__ == "__main__":
    main(0, int(sys.argv[1])) if len(sys.argv) == 2 else main(int(sys.argv[1]), int(sys.argv[2]))
