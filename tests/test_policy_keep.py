"""What a decode worker's death costs: nothing of the prompt, and at most two blocks of the answer.

Random worlds are simulated in which one decode worker dies, and every computed position is counted. That nothing is
lost, read too early or leaked on the way is held for the same objects by `test_sim_laws.py`.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from random import Random

import pytest
from policy_world import Pick, Witness, World, draw_world

from diptych.policy.batching import WorkerSpec
from diptych.policy.messages import (
    Answer,
    Beat,
    Cancel,
    CancelPull,
    Done,
    Drop,
    Finish,
    Message,
    PeerLost,
    Place,
    Publish,
    Pull,
    Purpose,
    Read,
    ReadFailed,
    Reason,
    Role,
    Run,
    Settled,
    StepDone,
    Tick,
    WorkerEvent,
    WorkerOrder,
    attempt_id,
    request_of,
)
from diptych.policy.retention import Release, Replicate, Replicated
from diptych.policy.worker import Worker
from diptych.sim.conditions import WorkerDies
from diptych.sim.costs import Costs, Link, StepCost
from diptych.sim.driver import Simulation

SIZE = 4

# --- the prefill side ------------------------------------------------------------------------------------------------


class Stage:
    """A prefill worker that has handed over request 1 (14 tokens: three full blocks and two tokens) to `d`."""

    def __init__(self, num_blocks: int = 16, done: bool = True, **spec: object):
        made = WorkerSpec("p", Role.PREFILL, num_blocks=num_blocks, block_size=SIZE, chunk=None, lease_s=9.0)
        self.worker = Worker(replace(made, **spec))  # type: ignore[arg-type]
        self.now = 0.0
        self.rid = attempt_id(1, 0)
        self.hears(place(self.rid, 14))
        self.compute()
        if done:
            self.hears(Done("d", self.rid))

    def hears(self, event: WorkerEvent) -> list[WorkerOrder]:
        orders = self.worker.on(self.now, event)
        self.worker.pool.check()
        return orders

    def compute(self) -> list[WorkerOrder]:
        (step,) = self.worker._steps
        return self.hears(StepDone(step, 0.1))

    def replicate(self, first: int, *blocks: int) -> list[WorkerOrder]:
        return self.hears(
            Replicate("d", self.rid, first, blocks, tuple(bytes([first + i]) for i in range(len(blocks))))
        )

    @property
    def counts(self) -> dict[str, int]:
        return {state: count for state, count in self.worker.pool.counts().items() if count}


def place(rid: int, num_tokens: int, num_prompt: int = 14, peer: str = "d", part: Role = Role.PREFILL) -> Place:
    hashes = tuple(bytes([i]) for i in range(num_tokens // SIZE))
    return Place("p", rid, part, peer, num_prompt, num_tokens, 20, hashes, 0, 1)


def computes(orders: Sequence[WorkerOrder]) -> list[tuple[int, int]]:
    return [(piece.start, piece.count) for order in orders if isinstance(order, Run) for piece in order.slices]


def test_what_was_handed_over_is_kept_until_the_decode_side_releases_it() -> None:
    stage = Stage()
    assert stage.counts == {"free": 12, "kept": 4}
    assert stage.hears(Release("d", stage.rid)) == []
    assert stage.counts == {"free": 13, "cached": 3}, "the last block is not full, so nobody could find it"


def test_the_next_attempt_computes_only_what_was_written_since() -> None:
    stage = Stage()
    stage.hears(PeerLost("d"))
    orders = stage.hears(place(attempt_id(1, 1), 17, peer="e"))
    assert computes(orders) == [(14, 3)], "14 tokens of the prompt are here"
    assert stage.counts == {"free": 11, "held": 5}


def test_blocks_of_the_answer_are_read_back_and_found() -> None:
    stage = Stage()
    (pull,) = stage.replicate(3, 7)
    assert isinstance(pull, Pull) and pull.purpose == Purpose.REPLICA and pull.source == (7,)
    assert stage.replicate(4, 9) == [], "one read at a time"
    replicated, second = stage.hears(Read(pull.pull, 1, 0.1))
    assert replicated == Replicated("d", stage.rid, 4), "three of the prompt, and this one"
    assert isinstance(second, Pull) and second.source == (9,)
    assert stage.hears(Read(second.pull, 1, 0.1)) == [Replicated("d", stage.rid, 5)]
    assert stage.counts == {"free": 11, "kept": 5}, "the block that was not full has given way"
    stage.hears(PeerLost("d"))
    assert computes(stage.hears(place(attempt_id(1, 1), 23, peer="e"))) == [(20, 3)]


def test_a_gap_is_not_bridged() -> None:
    stage = Stage()
    assert stage.replicate(5, 7) == [Drop("d", stage.rid)]
    assert stage.replicate(3, 7) == [Drop("d", stage.rid)], "what was refused once stays refused"


def test_a_read_that_fails_is_fenced_until_it_settles() -> None:
    stage = Stage()
    (pull,) = stage.replicate(3, 7)
    assert isinstance(pull, Pull)
    assert stage.hears(ReadFailed(pull.pull, "checksum")) == [CancelPull(pull.pull)]
    assert stage.counts["quarantined"] == 1
    assert stage.replicate(4, 8) == [], "the word comes when it has settled"
    assert stage.hears(Settled(pull.pull)) == [Drop("d", stage.rid)]
    assert "quarantined" not in stage.counts
    stage.hears(PeerLost("d"))
    assert computes(stage.hears(place(attempt_id(1, 1), 17, peer="e"))) == [(14, 3)], "the prompt is as safe as before"


def test_what_needs_memory_gets_it_and_replicas_do_not_take_it_from_others() -> None:
    stage = Stage(num_blocks=4)
    assert stage.replicate(3, 7) == [Drop("d", stage.rid)], "there is no block that nobody would miss"
    stage.hears(Place("p", attempt_id(2, 0), Role.PREFILL, "d", 7, 7, 1, (b"x",), 0, 2))
    assert stage.counts == {"held": 2, "kept": 2}


def test_nobody_comes_back_within_a_lease() -> None:
    stage = Stage()
    stage.hears(PeerLost("d"))
    assert stage.worker.next_deadline() == 9.0
    stage.now = 9.0
    stage.hears(Tick())
    assert stage.counts == {"free": 13, "cached": 3} and len(stage.worker.keep) == 0


def test_who_could_not_read_it_wants_it_kept_all_the_same() -> None:
    """The decode side computes the prompt itself, and may die like any other."""
    stage = Stage(done=False)
    stage.hears(Drop("d", stage.rid, kept=True))
    assert stage.counts == {"free": 12, "kept": 4}
    (pull,) = stage.replicate(3, 7)
    assert isinstance(pull, Pull) and stage.hears(Read(pull.pull, 1, 0.1)) == [Replicated("d", stage.rid, 4)]
    stage.hears(PeerLost("d"))
    assert computes(stage.hears(place(attempt_id(1, 1), 17, peer="e"))) == [(16, 1)]
    gone = Stage(done=False)
    gone.hears(Drop("d", gone.rid))
    assert gone.counts == {"free": 13, "cached": 3}, "nobody reads it: its client has left"


def test_no_lease_ends_while_the_next_attempt_waits_for_memory() -> None:
    stage = Stage()
    stage.hears(Place("p", attempt_id(2, 0), Role.PREFILL, "e", 47, 47, 20, (), 0, 0))
    stage.compute()
    stage.hears(PeerLost("d"))
    assert computes(stage.hears(place(attempt_id(1, 1), 17, peer="e"))) == [], "the other one has all that is free"
    stage.now = 9.0
    stage.hears(Beat("e", (attempt_id(2, 0),)))
    stage.hears(Tick())
    assert stage.counts == {"offered": 12, "kept": 4}
    stage.hears(Cancel("p", attempt_id(1, 1)))
    stage.now = 17.9
    stage.hears(Beat("e", (attempt_id(2, 0),)))
    stage.hears(Tick())
    assert stage.counts == {"offered": 12, "kept": 4}, "a whole lease after that one has given up"
    stage.now = 18.0
    stage.hears(Tick())
    assert stage.counts == {"offered": 12, "free": 1, "cached": 3}


def test_an_attempt_that_is_still_computed_is_taken_over_with_all_it_has() -> None:
    stage = Stage()
    stage.hears(place(attempt_id(2, 0), 30, num_prompt=30))
    orders = stage.hears(place(attempt_id(2, 1), 30, num_prompt=30, peer="e"))
    assert [order.reason for order in orders if isinstance(order, Finish)] == [Reason.SUPERSEDED]
    assert computes(stage.compute()) == [(29, 1)], "only the last token, for what it yields"


# --- the decode side -------------------------------------------------------------------------------------------------


def decoding(**spec: object) -> tuple[Worker, list[WorkerOrder]]:
    """A decode worker to which request 1 was handed over."""
    made = WorkerSpec("d", Role.DECODE, num_blocks=16, block_size=SIZE, lease_s=9.0)
    worker = Worker(replace(made, **spec))  # type: ignore[arg-type]
    rid = attempt_id(1, 0)
    worker.on(0.0, place(rid, 14, peer="p", part=Role.DECODE))
    worker.on(0.0, Publish("p", rid, (5, 6, 7, 8), 14, final=True))
    worker.on(0.0, Read(1, 1, 0.1))
    return worker, worker.on(0.0, Answer("p", rid, True))


def write(worker: Worker, num_tokens: int) -> list[WorkerOrder]:
    """Steps, and the orders of the last; a block that fills is told with its hash."""
    orders: list[WorkerOrder] = []
    for _ in range(num_tokens):
        ((step, (piece,)),) = worker._steps.items()
        full, end = (piece.start + 1) % SIZE == 0, (piece.start + 1) // SIZE
        orders = worker.on(0.0, StepDone(step, 0.1, filled=((piece.rid, bytes([end - 1])),) if full else ()))
        worker.pool.check()
    return orders


def test_each_block_of_the_answer_is_offered_when_it_is_full() -> None:
    worker, _ = decoding()
    rid = attempt_id(1, 0)
    assert not [o for o in write(worker, 1) if isinstance(o, Replicate)]
    (replicate,) = [o for o in write(worker, 1) if isinstance(o, Replicate)]
    assert (replicate.first, replicate.hashes) == (3, (bytes([3]),))
    assert worker.pool.counts()["offered"] == 1
    worker.on(0.0, Replicated("p", rid, 4))
    assert worker.pool.counts()["offered"] == 0
    assert [o.first for o in write(worker, 4) if isinstance(o, Replicate)] == [4]
    worker.on(0.0, Replicated("p", rid, 4))
    assert worker.pool.counts()["offered"] == 1, "what is said twice frees nothing that may still be read"
    worker.on(0.0, Drop("p", rid))
    assert not [o for o in write(worker, 4) if isinstance(o, Replicate)], "the keeper wants no more"


def test_what_is_read_outlives_the_answer_and_its_end_is_told() -> None:
    worker, _ = decoding()
    rid = attempt_id(1, 0)
    write(worker, 2)
    orders = worker.on(0.0, Cancel("d", rid))
    while worker._steps:
        orders += write(worker, 1)
    assert Release("p", rid) in orders
    assert worker.pool.counts()["offered"] == 1, "the reader has not said that it is through"
    worker.on(9.0, Tick())
    assert worker.pool.counts()["offered"] == 0, "but it has a lease to say so"


def test_a_lost_keeper_is_told_nothing_more() -> None:
    worker, _ = decoding()
    write(worker, 2)
    worker.on(0.0, PeerLost("p"))
    assert worker.pool.counts()["offered"] == 0
    orders = write(worker, 17)
    assert [o.reason for o in orders if isinstance(o, Finish)] == [Reason.LENGTH]
    assert not [o for o in orders if isinstance(o, Release | Replicate)]


# --- a death, in random worlds ---------------------------------------------------------------------------------------


def roomy(pick: Pick) -> World:
    """Two and two workers with room for everybody, fast links, and the death of one decode worker."""
    world = draw_world(pick, quiet=True)
    size = world.cluster[0].block_size
    cluster = tuple(
        WorkerSpec(name, role, 240, size, chunk=(None, 3, 8)[pick(0, 2)], depth=pick(1, 2))
        for name, role in (("p0", Role.PREFILL), ("p1", Role.PREFILL), ("d0", Role.DECODE), ("d1", Role.DECODE))
    )
    happenings = (WorkerDies(pick(20, 400) / 1000, "d0", (None, 0.05)[pick(0, 1)]),)
    return replace(
        world, cluster=cluster, happenings=happenings, read_failure=0.0, settle_s=0.0, link=Link(1e9, 0.0, "pair"),
        message_s=0.0005, costs=Costs(StepCost(0.01, 0.001, 0.0001), kv_bytes_per_token=64),
    )  # fmt: skip


@pytest.mark.parametrize("block", range(3))
def test_a_decode_workers_death_costs_no_prompt(block: int) -> None:
    num_resumed = 0
    for seed in range(60 * block, 60 * (block + 1)):
        world = roomy(Random(seed).randint)
        ran: Counter[tuple[int, int]] = Counter()
        resumed: dict[int, int] = {}  # request -> tokens of the answer that were known at its last placement
        witness = Witness(world)

        def observe(now: float, name: str, event: Message, orders: Sequence[Message]) -> None:
            witness(now, name, event, orders)  # noqa: B023
            if isinstance(event, Place) and event.rid % 64:
                resumed[request_of(event.rid)] = event.num_tokens - event.num_prompt  # noqa: B023
            if name.startswith("p"):
                for order in orders:
                    for piece in order.slices if isinstance(order, Run) else ():
                        where = request_of(piece.rid)
                        ran.update((where, i) for i in range(piece.start, piece.start + piece.count))  # noqa: B023

        simulation = Simulation(
            world.cluster, world.router, world.costs, world.link, world.arrivals,
            conditions=witness, happenings=world.happenings, observer=observe, bulk=False, num_events=50_000,
        )  # fmt: skip
        witness.simulation = simulation
        witness.check_end(simulation.run())
        num_resumed += len(resumed)
        size = world.cluster[0].block_size
        for request, num_written in resumed.items():
            prompt = world.arrivals[request].num_prompt
            twice = [i for (number, i), times in ran.items() if number == request and times > 1 and i < prompt]
            again = [i for (number, i) in ran if number == request and i >= prompt]
            assert len(twice) <= (0 if num_written else size), (seed, request, twice)
            assert len(again) <= 2 * size, (seed, request, again)
    assert num_resumed > 15
