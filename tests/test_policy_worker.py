"""A worker's decisions, one story at a time: what it hears and what it then orders."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from diptych.policy.batching import WorkerSpec
from diptych.policy.membership import Drain, Drained
from diptych.policy.messages import (
    Answer,
    Beat,
    Cancel,
    CancelPull,
    Done,
    Drop,
    Emit,
    Finish,
    Offer,
    PeerLost,
    Place,
    Publish,
    Pull,
    Read,
    ReadFailed,
    Reason,
    Revoke,
    Role,
    Run,
    Settled,
    Slice,
    StepDone,
    Tick,
    WorkerEvent,
    WorkerOrder,
)
from diptych.policy.retention import Release
from diptych.policy.worker import Worker

SPEC = WorkerSpec("w", Role.MIXED, num_blocks=16, block_size=4, chunk=None, lease_s=9.0)


class Stage:
    """A worker and a clock. Every event is checked to leave the pool whole."""

    def __init__(self, spec: WorkerSpec = SPEC, **changes: object):
        self.worker = Worker(replace(spec, **changes))  # type: ignore[arg-type]
        self.now = 0.0

    def hears(self, *events: WorkerEvent) -> list[WorkerOrder]:
        orders: list[WorkerOrder] = []
        for event in events:
            orders += self.worker.on(self.now, event)
            self.worker.pool.check()
        return orders

    def place(self, rid: int, num_prompt: int, max_new: int = 4, **details: object) -> list[WorkerOrder]:
        place = Place("w", rid, Role.MIXED, "", num_prompt, num_prompt, max_new, (), 0, rid)
        return self.hears(replace(place, **details))  # type: ignore[arg-type]

    def step(self, finished: Sequence[int] = (), **details: object) -> list[WorkerOrder]:
        """The oldest step in flight is done."""
        done = StepDone(min(self.worker._steps), 0.01, finished=tuple(finished))
        return self.hears(replace(done, **details))  # type: ignore[arg-type]

    def run_until_idle(self) -> list[WorkerOrder]:
        orders = []
        while self.worker._steps:
            orders += self.step()
        return orders

    def tick(self) -> list[WorkerOrder]:
        """Its next deadline comes."""
        deadline = self.worker.next_deadline()
        assert deadline is not None and deadline >= self.now
        self.now = deadline
        return self.hears(Tick())

    @property
    def counts(self) -> dict[str, int]:
        return {state: count for state, count in self.worker.pool.counts().items() if count}


def kinds(orders: Sequence[WorkerOrder]) -> list[str]:
    return [type(order).__name__ for order in orders]


def slices(orders: Sequence[WorkerOrder]) -> list[tuple[int, int, int]]:
    return [(s.rid, s.start, s.count) for order in orders if isinstance(order, Run) for s in order.slices]


def finish_of(orders: Sequence[WorkerOrder]) -> list[tuple[int, Reason]]:
    return [(order.rid, order.reason) for order in orders if isinstance(order, Finish)]


# --- a mixed worker --------------------------------------------------------------------------------------------------


def test_a_whole_prompt_then_one_token_a_step() -> None:
    stage = Stage()
    assert stage.place(1, 6, max_new=3) == [Run(1, (Slice(1, 0, 6, (0, 1), sample=True, admit=True),))]
    assert stage.step() == [Emit(1, 0, 1), Run(2, (Slice(1, 6, 1, sample=True),))]
    assert stage.step() == [Emit(1, 1, 1), Run(3, (Slice(1, 7, 1, sample=True),))]
    *_, emit, finish = stage.step()
    assert emit == Emit(1, 2, 1) and isinstance(finish, Finish) and finish.reason == Reason.LENGTH
    assert stage.counts == {"free": 16} and not stage.worker.seqs


def silent(stage: Stage, rid: int, num_prompt: int, **details: object) -> list[WorkerOrder]:
    """Place a prompt after which nothing is written."""
    return stage.place(rid, num_prompt, max_new=0, part=Role.PREFILL, **details)


@pytest.mark.parametrize("role", [Role.PREFILL, Role.MIXED])
def test_a_prompt_that_wants_no_answer_is_computed_and_over(role: Role) -> None:
    """No offer, no publishing, no token: it says Finish, and its blocks are there for others to find."""
    stage = Stage(role=role, chunk=4)
    hashes = (b"a", b"b")
    orders = [*silent(stage, 1, 9, hashes=hashes), *stage.run_until_idle()]
    assert kinds(orders) == ["Run", "Run", "Run", "Finish"] and finish_of(orders) == [(1, Reason.COMPUTED)]
    assert slices(orders) == [(1, 0, 4), (1, 4, 4), (1, 8, 1)]
    assert stage.counts == {"free": 14, "cached": 2} and not stage.worker.seqs
    assert slices([*silent(stage, 2, 9, hashes=hashes), *stage.run_until_idle()]) == [(2, 8, 1)]


def test_it_fits_into_a_pool_of_its_size_and_is_refused_by_a_smaller_one() -> None:
    stage = Stage(num_blocks=2)
    assert kinds(silent(stage, 1, 8)) == ["Run"] and finish_of(stage.step()) == [(1, Reason.COMPUTED)]
    assert finish_of(silent(stage, 2, 9)) == [(2, Reason.REFUSED)]


def test_it_gives_its_memory_to_an_older_answer_and_is_computed_again() -> None:
    stage = Stage(num_blocks=4, chunk=2)
    stage.place(1, 8, max_new=3)
    assert slices([*stage.step(), *stage.step(), *stage.step()])[-1] == (1, 6, 2)
    assert silent(stage, 2, 8) == [], "it has the other two blocks, and waits for the step in flight"
    orders = stage.run_until_idle()
    assert stage.worker.num_preempted == 1
    assert finish_of(orders) == [(1, Reason.LENGTH), (2, Reason.COMPUTED)]
    assert [start for rid, start, _ in slices(orders) if rid == 2] == [0, 2, 4, 6]


def test_a_cancelled_one_goes_when_its_step_is_back() -> None:
    stage = Stage()
    silent(stage, 1, 6)
    assert finish_of(stage.hears(Cancel("w", 1))) == [(1, Reason.CANCELLED)] and stage.worker.seqs
    assert stage.step() == [] and stage.counts == {"free": 16} and not stage.worker.seqs


def test_a_stop_token_ends_it() -> None:
    stage = Stage()
    stage.place(1, 6)
    orders = stage.step(finished=[1])
    assert kinds(orders) == ["Emit", "Finish"] and finish_of(orders) == [(1, Reason.STOP)]


def test_chunks_ride_with_decodes() -> None:
    stage = Stage(chunk=16)
    stage.place(1, 5)
    stage.step()
    stage.place(2, 40)
    assert slices(stage.step()) == [(1, 6, 1), (2, 0, 16)]
    assert slices(stage.step()) == [(1, 7, 1), (2, 16, 16)]
    orders = stage.step()
    assert slices(orders) == [(2, 32, 8)] and finish_of(orders) == [(1, Reason.LENGTH)]


def test_lower_priority_numbers_go_first_then_the_older() -> None:
    stage = Stage(chunk=4)
    stage.place(1, 4)
    stage.place(2, 4, order=2)
    stage.place(3, 4, order=3, priority=-1)
    stage.place(4, 4, order=1)
    order = [rid for rid, start, _ in slices(stage.run_until_idle()) if start == 0]
    assert order == [3, 4, 2]


def test_a_second_step_is_planned_before_the_first_is_back() -> None:
    stage = Stage(depth=2)
    assert slices(stage.place(1, 6, max_new=3)) == [(1, 0, 6), (1, 6, 1)]
    assert slices(stage.step()) == [(1, 7, 1)]


def test_with_a_step_in_flight_the_end_is_said_with_the_stop_token_and_the_blocks_stay() -> None:
    stage = Stage(depth=2)
    stage.place(1, 6)
    assert kinds(stage.step(finished=[1])) == ["Emit", "Finish"]
    assert stage.counts["held"] == 2, "the step in flight still writes into them"
    assert stage.step() == []
    assert stage.counts == {"free": 16}


def test_a_cancel_while_it_computes_frees_its_blocks_when_the_step_is_back() -> None:
    stage = Stage()
    stage.place(1, 6)
    assert finish_of(stage.hears(Cancel("w", 1))) == [(1, Reason.CANCELLED)]
    assert stage.counts["held"] == 2
    assert stage.step() == []
    assert stage.counts == {"free": 16} and not stage.worker.seqs


def test_what_does_not_fit_the_pool_is_refused() -> None:
    stage = Stage()
    assert finish_of(stage.place(1, 61, max_new=5)) == [(1, Reason.REFUSED)]
    assert finish_of(stage.place(2, 61, max_new=4)) == [], "the KV of the last token is never written"


def test_a_prefix_is_computed_once() -> None:
    stage = Stage()
    stage.place(1, 10, hashes=(b"a", b"b"))
    stage.place(2, 9, hashes=(b"a", b"b"))
    assert slices(stage.step())[-1] == (2, 0, 9), "it was placed before the blocks were known"
    stage.place(3, 10, hashes=(b"a", b"b"))
    stage.step()
    (shared,) = [s for s in stage.worker.running if s.rid == 3]
    assert shared.blocks[:2] == stage.worker.seqs[1].blocks[:2] and shared.num_computed >= 8
    stage.run_until_idle()
    assert stage.counts == {"free": 14, "cached": 2}


def test_generated_blocks_become_known_and_are_found_by_the_next_turn() -> None:
    stage = Stage()
    stage.place(1, 7, max_new=3, hashes=(b"a",))
    stage.step()
    stage.step(filled=((1, b"b"),))
    stage.step()
    orders = stage.place(2, 12, hashes=(b"a", b"b", b"c"))
    assert slices(orders) == [(2, 8, 4)]


def test_a_decode_takes_memory_from_the_youngest_who_computes_again_later() -> None:
    stage = Stage(num_blocks=4)
    stage.place(1, 7, max_new=6)
    stage.place(2, 7, max_new=6)
    orders = stage.run_until_idle()
    assert stage.worker.num_preempted == 1
    assert [(s[0], s[1], s[2]) for s in slices(orders) if s[2] > 1] == [(2, 0, 7), (2, 0, 8)]
    tokens = [order.first for order in orders if isinstance(order, Emit) and order.rid == 2]
    assert tokens == list(range(6)), "none is lost, none is said twice"
    assert stage.counts == {"free": 4}


def test_who_waits_for_memory_is_not_overtaken() -> None:
    stage = Stage(num_blocks=4)
    stage.place(1, 8, max_new=2)
    stage.place(2, 16, max_new=1)
    stage.place(3, 2, max_new=1)
    assert stage.worker.idle_reason() == "" and [seq.rid for seq in stage.worker.claims] == [2, 3]
    assert [rid for rid, start, _ in slices(stage.run_until_idle()) if start == 0] == [2, 3]


def test_the_horizon_is_the_shortest_answer_and_one_while_a_prompt_waits_for_its_first_token() -> None:
    stage = Stage()
    stage.place(1, 6, max_new=9)
    assert stage.worker.horizon() == 1
    stage.step()
    assert stage.worker.horizon() == 8
    stage.hears(Cancel("w", 1))
    assert stage.worker.horizon() == 1, "it ends with this step"


def test_one_bulk_is_many_single_steps() -> None:
    single, bulk = Stage(), Stage()
    for stage in (single, bulk):
        stage.place(1, 6, max_new=9)
        stage.place(2, 3, max_new=30)
        stage.step()
        stage.step()
    emitted = [order for _ in range(6) for order in single.step() if isinstance(order, Emit)]
    orders = bulk.step(count=6)
    assert [(o.rid, o.first, o.count) for o in orders if isinstance(o, Emit)] == [(1, 2, 6), (2, 1, 6)]
    assert len(emitted) == 12
    for rid in (1, 2):
        assert bulk.worker.seqs[rid].blocks == single.worker.seqs[rid].blocks
        assert bulk.worker.seqs[rid].num_computed == single.worker.seqs[rid].num_computed


# --- the prefill side ------------------------------------------------------------------------------------------------


def prefill_stage(**changes: object) -> Stage:
    return Stage(WorkerSpec("p", Role.PREFILL, num_blocks=16, block_size=4, chunk=8, lease_s=9.0), **changes)


def place_prefill(stage: Stage, rid: int = 1, num_prompt: int = 14, max_new: int = 4) -> list[WorkerOrder]:
    return stage.place(rid, num_prompt, max_new, part=Role.PREFILL, peer="d")


def test_prefill_offers_publishes_block_by_block_emits_and_waits_for_done() -> None:
    stage = prefill_stage()
    offer, run = place_prefill(stage)
    assert offer == Offer("d", 1, 14) and slices([run]) == [(1, 0, 8)]
    publish, run = stage.step()
    assert publish == Publish("d", 1, (0, 1), 8, final=False) and slices([run]) == [(1, 8, 6)]
    assert stage.step() == [Emit(1, 0, 1), Publish("d", 1, (2, 3), 14, final=True)]
    assert stage.counts["offered"] == 4
    answer, finish = stage.hears(Done("d", 1))
    assert answer == Answer("d", 1, True) and finish_of([finish]) == [(1, Reason.HANDED_OVER)]
    assert stage.counts == {"free": 16}


def test_an_answer_of_one_token_is_not_handed_over() -> None:
    stage = prefill_stage(chunk=None)
    place_prefill(stage, max_new=1)
    orders = stage.step()
    assert kinds(orders) == ["Emit", "Finish"] and finish_of(orders) == [(1, Reason.LENGTH)]
    assert stage.counts == {"free": 16}


def test_published_blocks_are_taken_back_through_the_reader() -> None:
    stage = prefill_stage()
    place_prefill(stage)
    stage.step()
    stage.hears(Cancel("p", 1))
    assert stage.step() == [Revoke("d", 1)]
    assert stage.counts["offered"] == 2, "the reader may still read"
    assert stage.hears(Drop("d", 1)) == []
    assert stage.counts == {"free": 16}


def test_a_silent_reader_costs_a_lease_and_no_more() -> None:
    stage = prefill_stage(chunk=None)
    place_prefill(stage)
    stage.step()
    stage.now = 5.0
    stage.hears(Beat("d", (1,)))
    stage.now = 0.0 + 9.0
    assert stage.hears(Tick()) == [], "the beat extended it"
    stage.now = 14.0
    assert finish_of(stage.hears(Tick())) == [(1, Reason.EXPIRED)]
    assert stage.counts == {"free": 16}
    assert stage.hears(Done("d", 1)) == [Answer("d", 1, False)], "gone"


def test_a_lost_reader_frees_everything_meant_for_it() -> None:
    stage = prefill_stage(chunk=8)
    place_prefill(stage, 64)
    place_prefill(stage, 128)
    stage.step()
    assert finish_of(stage.hears(PeerLost("d"))) == [(64, Reason.PEER_LOST), (128, Reason.PEER_LOST)]
    stage.run_until_idle()
    assert stage.counts == {"free": 15, "kept": 1} and not stage.worker.seqs
    stage.tick()
    assert stage.counts == {"free": 16}, "what was computed is kept for a lease, in case its request comes back"


def test_who_drains_says_so_when_nobody_needs_what_is_here_any_more() -> None:
    stage = prefill_stage(chunk=8)
    place_prefill(stage, 1)
    assert stage.hears(Drain("w", 0.0)) == []
    assert "Drained" not in kinds(stage.run_until_idle()), "its KV is offered"
    assert kinds(stage.hears(Done("d", 1))) == ["Answer", "Finish", "Drained"]
    assert Stage().hears(Drain("w", 0.0)) == [Drained("w")]


def test_who_asks_for_what_is_not_here_hears_so() -> None:
    stage = prefill_stage()
    place_prefill(stage, 1)
    assert stage.hears(Beat("d", (1, 7))) == [Answer("d", 7, False)]


# --- the decode side -------------------------------------------------------------------------------------------------

READY = Publish("p", 1, (5, 6), 8, final=False)
REST = Publish("p", 1, (9, 3), 14, final=True)


def decode_stage(**changes: object) -> Stage:
    return Stage(WorkerSpec("d", Role.DECODE, num_blocks=8, block_size=4, chunk=8, lease_s=9.0), **changes)


def place_decode(stage: Stage, rid: int = 1, num_prompt: int = 14, **details: object) -> list[WorkerOrder]:
    return stage.place(rid, num_prompt, 4, part=Role.DECODE, peer="p", **details)


def test_decode_reads_what_is_ready_says_done_and_goes_on_with_the_second_token() -> None:
    stage = decode_stage()
    assert place_decode(stage) == [] and stage.worker.idle_reason() == "a peer"
    assert stage.hears(READY) == [Pull(1, 1, "p", 0, (5, 6), (0, 1))]
    assert stage.hears(REST) == [Pull(2, 1, "p", 2, (9, 3), (2, 3))]
    assert stage.counts == {"free": 4, "reserved": 4}
    assert stage.hears(Read(2, 1, 0.1)) == [], "the first read is still under way"
    assert stage.hears(Read(1, 1, 0.1)) == [Done("p", 1)]
    (run,) = stage.hears(Answer("p", 1, True))
    assert run == Run(1, (Slice(1, 14, 1, (0, 1, 2, 3), sample=True, admit=True),))
    assert stage.step()[0] == Emit(1, 1, 1)
    rungs = (("queued", 0.0), ("handover", 0.0), ("decoding", 0.0))
    assert stage.run_until_idle()[-2:] == [Finish(1, "d", Reason.LENGTH, rungs), Release("p", 1)]


def test_a_publish_may_come_before_the_place() -> None:
    stage = decode_stage()
    assert stage.hears(READY) == []
    assert place_decode(stage) == [Pull(1, 1, "p", 0, (5, 6), (0, 1))]


def test_an_early_publish_nobody_claims_is_declined_and_its_place_finds_nothing() -> None:
    stage = decode_stage()
    stage.hears(READY)
    assert stage.tick() == [Drop("p", 1)]
    place_decode(stage)
    orders = stage.hears(Answer("p", 1, False))  # to a beat: the source does not know it (any more)
    assert finish_of(orders) == [(1, Reason.PEER_LOST)]


def test_a_publish_with_a_part_missing_before_it_is_not_read() -> None:
    stage = decode_stage()
    place_decode(stage)
    orders = stage.hears(REST)
    assert kinds(orders) == ["Drop", "Run"] and slices(orders) == [(1, 0, 8)], "computed here instead"


def test_the_prefix_that_is_here_does_not_travel() -> None:
    stage = decode_stage()
    stage.place(9, 8, 1, hashes=(b"a", b"b"))
    stage.run_until_idle()
    place_decode(stage, hashes=(b"a", b"b", b"c"))
    assert stage.hears(READY) == []
    (pull,) = stage.hears(REST)
    assert isinstance(pull, Pull) and pull.first == 2 and pull.source == (9, 3)


def test_a_cancelled_read_keeps_its_blocks_until_it_has_settled() -> None:
    stage = decode_stage()
    place_decode(stage)
    stage.hears(READY)
    cancel, finish = sorted(stage.hears(Cancel("d", 1)), key=lambda order: type(order).__name__)
    assert cancel == CancelPull(1) and finish_of([finish]) == [(1, Reason.CANCELLED)]
    assert stage.counts == {"free": 6, "quarantined": 2}
    assert stage.hears(Settled(1)) == [Drop("p", 1)], "only now may the source take its blocks back"
    assert stage.counts == {"free": 8}


def test_a_read_that_was_done_already_settles_a_cancelled_one() -> None:
    stage = decode_stage()
    place_decode(stage)
    stage.hears(READY, Cancel("d", 1))
    assert stage.hears(Read(1, 1, 0.1)) == [Drop("p", 1)]
    assert stage.counts == {"free": 8}


def test_a_revoke_is_always_answered_but_not_before_the_last_read_has_settled() -> None:
    stage = decode_stage()
    assert stage.hears(Revoke("p", 1)) == [Drop("p", 1)]
    place_decode(stage, 2)
    stage.hears(replace(READY, rid=2))
    assert "Drop" not in kinds(stage.hears(Revoke("p", 2)))
    assert stage.hears(Revoke("p", 2)) == []
    assert stage.hears(Settled(1)) == [Drop("p", 2)]


def test_a_failed_read_is_computed_here_once_everything_is_known() -> None:
    stage = decode_stage()
    place_decode(stage)
    stage.hears(READY)
    assert stage.hears(ReadFailed(1, "checksum")) == [CancelPull(1)]
    assert stage.hears(Settled(1)) == []
    orders = stage.hears(REST)
    assert orders[0] == Drop("p", 1, kept=True) and slices(orders) == [(1, 0, 8)]
    assert slices(stage.step()) == [(1, 8, 7)], "fourteen of the prompt and the first token"
    assert stage.step()[0] == Emit(1, 1, 1)


def test_what_failed_while_it_waited_for_memory_holds_none() -> None:
    stage = decode_stage(num_blocks=4)
    stage.place(9, 8, 4, hashes=(b"a", b"b"))
    place_decode(stage, num_prompt=12, hashes=(b"x", b"b"))
    stage.hears(Publish("p", 1, (5,), 4, False))
    stage.hears(Publish("p", 1, (6, 7), 12, False))
    assert stage.worker.claims, "two more blocks, and one is free"
    stage.hears(ReadFailed(1, "checksum"), Settled(1))
    assert not stage.worker.claims
    stage.hears(Cancel("d", 1))
    stage.run_until_idle()
    assert stage.counts == {"free": 2, "cached": 2}


def test_gone_means_compute_it_here() -> None:
    stage = decode_stage()
    place_decode(stage)
    stage.hears(READY, REST, Read(1, 1, 0.1), Read(2, 1, 0.1))
    orders = stage.hears(Answer("p", 1, False))
    assert slices(orders) == [(1, 0, 8)] and stage.counts["held"] == 4


def test_a_lost_source_is_survived_if_everything_is_known_else_given_up() -> None:
    verified, known, halfway = decode_stage(), decode_stage(), decode_stage()
    for stage in (verified, known, halfway):
        place_decode(stage)
        stage.hears(READY, Read(1, 1, 0.1))
    verified.hears(REST, Read(2, 1, 0.1))
    assert slices(verified.hears(PeerLost("p"))) == [(1, 14, 1)], "checksums were right: nobody need be asked"
    known.hears(REST)
    assert slices(known.hears(PeerLost("p"))) == [(1, 0, 8)]
    assert finish_of(halfway.hears(PeerLost("p"))) == [(1, Reason.PEER_LOST)]
    assert halfway.counts == {"free": 8}


def test_who_expects_something_says_so_in_time() -> None:
    stage = decode_stage()
    place_decode(stage)
    assert stage.tick() == [Beat("p", (1,))] and stage.now == 3.0
    assert stage.tick() == [Beat("p", (1,))] and stage.now == 6.0


def test_a_running_answer_takes_memory_from_younger_kv_on_its_way_and_gets_it_first() -> None:
    stage = decode_stage(num_blocks=4)
    stage.place(1, 7, 6)
    stage.step()
    place_decode(stage, 2, 8, order=2)
    stage.hears(Publish("p", 2, (5, 6), 8, True))
    orders = stage.step()
    assert kinds(orders) == ["Emit", "CancelPull"] and stage.worker.idle_reason() == "memory"
    orders = stage.hears(Settled(1))
    assert kinds(orders) == ["Run"], "the running answer first; the other needs two blocks and there is one"
    assert kinds(stage.run_until_idle())[-2:] == ["Finish", "Pull"]


def test_older_kv_on_its_way_gets_the_memory_of_a_younger_answer_that_is_stuck() -> None:
    stage = decode_stage(num_blocks=4)
    stage.place(2, 4, 9, order=2)
    stage.step()
    place_decode(stage, 1, 13, order=1)
    stage.hears(Publish("p", 1, (5, 6), 8, False), Read(1, 1, 0.1))
    stage.hears(Publish("p", 1, (7, 8), 13, True))
    orders = stage.run_until_idle()
    assert kinds(orders)[-1] == "Pull" and stage.worker.num_preempted == 1
    (pull,) = [order for order in orders if isinstance(order, Pull)]
    assert stage.hears(Read(pull.pull, 1, 0.1)) == [Done("p", 1)]


def test_a_strangers_revoke_does_not_take_what_the_source_said_too_early() -> None:
    """Both came before our own Place: only what that peer said itself is forgotten."""
    stage = decode_stage()
    stage.hears(replace(READY, rid=9))
    stage.hears(Revoke("evil", 9))
    orders = stage.hears(Place("d", 9, Role.DECODE, "p", 8, 8, 4, (), 0, 1))
    assert [order.rid for order in orders if isinstance(order, Pull)] == [9]


def test_everybody_who_spoke_too_early_hears_that_nobody_reads() -> None:
    """So the driver, which goes by that word, forgets what came with it from each of them."""
    stage = decode_stage()
    stage.hears(replace(READY, rid=9))
    stage.hears(replace(READY, rid=9, peer="evil"))
    stage.now += 1000.0
    assert [order for order in stage.hears(Tick()) if isinstance(order, Drop)] == [Drop("p", 9), Drop("evil", 9)]
