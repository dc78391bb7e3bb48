"""The ownership protocol, explored exhaustively at small scope, and that the search would notice.

The larger scopes are explored outside the suite: `python tests/explore.py`. Each planted mistake takes one rule of
`docs/kv-protocol.md` away, and is found within a fraction of the states that the rule's scope has.
"""

from collections.abc import Iterable
from typing import Any

import pytest
from automata import Station, Step, Texts, clone
from explore import SCOPES, explore, spec

from diptych.policy.blocks import BlockPool, State
from diptych.policy.books import RequestView
from diptych.policy.copies import Copies
from diptych.policy.keep import Keep, Kept
from diptych.policy.messages import (
    MAX_ATTEMPTS,
    Answer,
    CancelPull,
    Done,
    Place,
    Reason,
    Role,
    WorkerEvent,
    WorkerOrder,
    attempt_id,
)
from diptych.policy.sequence import Sequence
from diptych.policy.sink import Incoming, Sink
from diptych.policy.source import Source
from diptych.policy.worker import Worker

Patch = tuple[Any, str, Any]
forget, let_go, worker_let_go, hear = Sink.forget, Sink._let_go, Worker._let_go, Worker.on


def free_at_once(pool: BlockPool, blocks: Iterable[int]) -> None:
    for block in blocks:
        pool._refs[block] -= 1
        pool._free.append(block)
        pool._move(block, State.FREE)


def settle_at_cancel(sink: Sink, *args: Any) -> list[WorkerOrder]:
    orders = let_go(sink, *args)
    for order in orders:
        if isinstance(order, CancelPull):
            sink._pool.settle(sink._reads.pop(order.pull).target)
    return orders


def drop_at_once(sink: Sink, coming: Incoming, now: float, drop: bool, kept: bool = False) -> list[WorkerOrder]:
    orders = forget(sink, coming, now, drop, kept)
    return [*orders, *sink._count_down(coming.seq.rid)]


def go_on_unasked(worker: Worker, now: float, event: WorkerEvent) -> list[WorkerOrder]:
    orders = hear(worker, now, event)
    for done in [order for order in orders if isinstance(order, Done)]:
        orders += hear(worker, now, Answer(done.peer, done.rid, True))
    return orders


def say_ok_to_all(source: Source, event: Done) -> tuple[WorkerOrder, Sequence | None]:
    offer = source._offers.get(event.rid)
    if offer is not None and offer.seq.ended is None:
        source._close(offer)
        return Answer(event.peer, event.rid, True), offer.seq
    return Answer(event.peer, event.rid, True), None


def close_unasked(source: Source, seq: Sequence, now: float) -> None:
    source._close(source._offers[seq.rid])


def stop_copies(worker: Worker, now: float, seq: Sequence) -> None:
    worker.copies.stop(seq.rid)
    worker_let_go(worker, now, seq)


def release_reads(keep: Keep, kept: Kept) -> list[WorkerOrder]:
    kept.deaf = True
    kept.waiting.clear()
    pull, kept.pull = kept.pull, None
    if pull is None:
        return []
    keep._pool.release(keep._reads.pop(pull).target)
    return [CancelPull(pull)]


def adopt_at_once(worker: Worker, now: float, place: Place) -> None:
    for attempt in range(place.rid % MAX_ATTEMPTS):
        seq = worker.seqs.get(place.rid - 1 - attempt)
        if seq is not None and seq.part == Role.PREFILL and seq.ended is None:
            worker._orders += worker.keep.take(seq, now, orphan=True)
            worker._end(now, seq, Reason.SUPERSEDED)


def first_attempt(view: RequestView) -> int:
    return attempt_id(view.submitted.request, 0)


def nothing(*_: Any) -> list[WorkerOrder]:
    return []


FREES, STUCK = "frees what", "nothing leads to an end"
MUTATIONS: dict[str, tuple[str, list[Patch], str]] = {
    "free on cancel": ("one", [(Sink, "_let_go", settle_at_cancel)], FREES),
    "no quarantine": ("one", [(BlockPool, "quarantine", free_at_once), (BlockPool, "settle", nothing)], FREES),
    "no epoch": (
        "restart",
        [(RequestView, "rid", property(first_attempt))],
        "KeyError",
    ),
    "decode without Answer": ("one", [(Worker, "on", go_on_unasked)], "goes on with what it read"),
    "Done before the last read": (
        "parts",
        [(Incoming, "complete", property(lambda c: c.final and not c.broken))],
        FREES,
    ),
    "Drop before settled": ("one", [(Sink, "forget", drop_at_once)], FREES),
    "ok after the lease": ("one", [(Source, "done", say_ok_to_all)], "ok is said"),
    "abort without asking": ("one", [(Source, "revoke", close_unasked)], FREES),
    "no lease": ("never", [(Source, "_start_lease", nothing)], STUCK),
    "Beat not answered": ("restart", [(Worker, "_beaten", nothing)], STUCK),
    "early Publish kept for ever": ("one", [(Sink, "decline", nothing)], STUCK),
    "kept blocks taken over unfenced": ("tail-cut", [(Worker, "_earlier", adopt_at_once)], "under others"),
    "kept for ever": ("restart", [(Keep, "lose", nothing)], STUCK),
    "Release not heard": ("one", [(Keep, "release", nothing)], STUCK),
    "replicas read unfenced": ("replicas", [(Keep, "_stop_reading", release_reads)], FREES),
    "copies end with the answer": ("replicas", [(Worker, "_let_go", stop_copies)], FREES),
    "no lease for copies": ("never", [(Copies, "expire", nothing)], STUCK),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_planted_mistakes_are_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scope, patches, why = MUTATIONS[name]
    for owner, attribute, replacement in patches:
        monkeypatch.setattr(owner, attribute, replacement)
    result = explore(SCOPES[scope])
    assert why in result.broken, result
    assert result.trace, "and the search says how"


@pytest.mark.parametrize(
    ("name", "at_least"),
    [
        ("calm", 800),
        ("failure", 3000),
        ("one", 6000),
        ("restart", 20_000),
        ("tail", 14_000),
        ("twice", 5000),
        ("never", 5000),
        ("failover", 15_000),
    ],
)
def test_every_state_of_a_scope_keeps_the_laws(name: str, at_least: int) -> None:
    """All states are looked at, and from each of them everything can still end."""
    result = explore(SCOPES[name])
    print(result)
    assert not result.broken, "\n".join([result.broken, *map(str, result.trace)])
    assert not result.bounded and result.num_states >= at_least and result.num_ends


def test_a_copied_object_is_the_same_state_and_goes_its_own_way() -> None:
    """What the search rests on: a copy decides as its original does, and leaves it as it was."""
    texts = Texts(((2, 2),), size=2)
    first = Station(spec("p"), texts)
    first.hear(Place("p", 0, Role.PREFILL, "d", 2, 2, 2, (), 0, 0))
    before = first.settle()
    second = clone(first, {})
    assert second.settle() == before
    second.hear(Step())
    assert second.settle() != before and first.settle() == before
    first.hear(Step())
    assert first.settle() == second.settle()
