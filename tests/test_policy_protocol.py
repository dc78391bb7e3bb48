"""The ownership protocol, explored exhaustively at small scope, and that the search would notice.

The larger scopes are explored outside the suite: `python tests/explore.py`. Each planted mistake takes one rule of
`docs/kv-protocol.md` away, and is found within a fraction of the states that the rule's scope has.
"""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
from explore import SCOPES, explore

from diptych.policy import router
from diptych.policy.blocks import BlockPool, State
from diptych.policy.copies import Copies
from diptych.policy.keep import Keep
from diptych.policy.memory import Memory
from diptych.policy.messages import MAX_ATTEMPTS, Answer, CancelPull, Done, WorkerOrder
from diptych.policy.sequence import Sequence
from diptych.policy.sink import Incoming, Sink
from diptych.policy.source import Source
from diptych.policy.worker import Worker

Patch = tuple[Any, str, Any]
forget, let_go, worker_let_go, ask = Sink.forget, Sink._let_go, Worker._let_go, Sink.ask
beaten, worker_beaten = Source.beat, Worker._beaten


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


def drop_at_once(sink: Sink, coming: Incoming, now: float, drop: bool) -> list[WorkerOrder]:
    orders = forget(sink, coming, now, drop)
    return [*orders, *sink._count_down(coming.seq.rid)]


def go_on_unasked(worker: Worker, now: float, pull: int) -> None:
    coming = worker.sink.read(pull, now)
    if coming is None:
        worker._orders += worker.sink.settled(pull, now)
    elif said := worker.sink.ask(coming):
        worker._orders += said
        coming.seq.keeper = coming.seq.peer
        worker._accept(now, coming)


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


MUTATIONS: dict[str, tuple[str, list[Patch], str]] = {
    "free on cancel": ("cancel", [(Sink, "_let_go", settle_at_cancel)], ""),
    "no quarantine": (
        "one", [(BlockPool, "quarantine", free_at_once), (BlockPool, "settle", lambda pool, blocks: None)], "",
    ),
    "no epoch": ("onedeath", [(router, "attempt_id", lambda request, attempt: request * MAX_ATTEMPTS)], ""),
    "drop before settled": ("one", [(Sink, "forget", drop_at_once)], ""),
    "go on unasked": ("one", [(Worker, "_read", go_on_unasked)], ""),
    "ok after the lease": ("one", [(Source, "done", say_ok_to_all)], ""),
    "no two-sided abort": ("one", [(Source, "revoke", close_unasked)], ""),
    "whole with a read under way": ("parts", [(Incoming, "complete", property(lambda c: c.final and not c.broken))], ""),
    "copies end with the answer": ("replicas", [(Worker, "_let_go", stop_copies)], ""),
    "replicas unfenced": ("replicas", [(Keep, "_stop_reading", None)], ""),
    "beats unanswered": ("onedeath", [(Worker, "_beaten", lambda worker, now, event: None)], ""),
    "no lease for copies": ("replicas", [(Copies, "expire", lambda copies, now: [])], ""),
    "early words unlimited": ("one", [(Sink, "decline", lambda sink, now: [])], ""),
    "tail kept while written": ("replicasdeath", [(Keep, "_drop_tail", lambda keep, kept: None)], ""),
}


def keep_on(keep: Keep, kept: Any) -> list[WorkerOrder]:
    kept.deaf = True
    kept.waiting.clear()
    pull, kept.pull = kept.pull, None
    if pull is None:
        return []
    reading = keep._reads.pop(pull)
    keep._pool.release(reading.target)
    return [CancelPull(pull)]


MUTATIONS["replicas unfenced"][1][0] = (Keep, "_stop_reading", keep_on)


@pytest.mark.parametrize("name", MUTATIONS)
def test_planted_mistakes_are_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scope, patches, law = MUTATIONS[name]
    for owner, attribute, replacement in patches:
        monkeypatch.setattr(owner, attribute, replacement)
    result = explore(SCOPES[scope], 100_000)
    print(name, "|", result, "|", result.broken, *result.trace, sep="\n   ")
    assert result.broken
