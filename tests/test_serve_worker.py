"""What a worker's driver takes from a peer: its own business with it, whole and in bounds. All else changes nothing."""

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from diptych.config import load_cluster
from diptych.engine.executor import Sampling
from diptych.engine.paced import oracle
from diptych.errors import ProtocolError
from diptych.policy.messages import Answer, Beat, Done, Drop, PeerLost, Publish, Revoke, Tick
from diptych.policy.retention import Release, Replicate, Replicated
from diptych.serve.build import build
from diptych.serve.local import LocalCluster
from diptych.serve.wire import pack_ids
from diptych.transfer.seam import NO_PERMIT

PROMPT = list(range(1, 70))
RID = 64  # the first attempt at the first request


@pytest.fixture
def cluster() -> Iterator[LocalCluster]:
    """p0 computes for d0; p1 and d1 have nothing to do with it."""
    config = load_cluster(None, {"engine": "paced", "prefill": 2, "decode": 2, "kv_memory": "64KiB", "chunk": 32})
    made = LocalCluster([build(config, worker) for worker in config.workers])
    made.config = config  # type: ignore[attr-defined]
    yield made
    made.close()


def halfway(cluster: LocalCluster) -> Any:
    """A request of which d0 has read a part."""
    answer = cluster.submit(PROMPT, 20, Sampling())
    while not cluster.workers["d0"].traffic.num_transfers:
        cluster.step()
    assert not answer.over and cluster.workers["p0"].policy.partner(RID) == "d0"
    return answer


def is_right(cluster: LocalCluster, answer: Any) -> None:
    cluster.run_until([answer])
    cluster.settle()
    assert answer.tokens == oracle(PROMPT, 20, cluster.config.paced)  # type: ignore[attr-defined]
    for driver in cluster.workers.values():
        driver.policy.pool.check()


STRANGE = [Done("p1", RID), Drop("p1", RID), Beat("p1", (RID,)), Release("p1", RID), Replicated("p1", RID, 1)]
STRANGE += [Revoke("p1", RID), Answer("p1", RID, True), Publish("p1", RID, (), 16, False)]  # type: ignore[list-item]


@pytest.mark.parametrize("said", STRANGE, ids=lambda said: type(said).__name__)
def test_who_does_not_share_a_request_has_no_say_in_it(cluster: LocalCluster, said: Any) -> None:
    answer = halfway(cluster)
    for victim in ("p0", "d0"):
        with pytest.raises(ProtocolError, match="is shared with"):
            cluster.workers[victim].told("p1", said)
        with pytest.raises(ProtocolError, match="speaks for"):
            cluster.workers[victim].told("d1", said)
    is_right(cluster, answer)


def test_an_answer_that_nobody_asked_for_is_not_used(cluster: LocalCluster) -> None:
    """Decoding would begin on KV that is not here."""
    answer = halfway(cluster)
    cluster.workers["d0"].told("p0", Answer("p0", RID, True))
    is_right(cluster, answer)


def test_what_was_said_before_is_of_no_use_again(cluster: LocalCluster) -> None:
    """Done, Drop and Publish of an attempt that is over, or of an older one: told so, or nothing."""
    answer = halfway(cluster)
    cluster.run_until([answer])
    cluster.settle()
    told: list[Any] = []
    source = cluster.workers["p0"]
    source._ports.tell = lambda peer, message, attachment: told.append(message)  # type: ignore[method-assign]
    for rid in (RID, RID - 64, RID + 1):
        source.told("d0", Done("d0", rid))
    assert told == [Answer("p0", RID, False), Answer("p0", RID - 64, False), Answer("p0", RID + 1, False)]
    source.told("d0", Drop("d0", RID))
    cluster.workers["d0"].told("p0", Publish("p0", RID, (1,), 16, False), NO_PERMIT + bytes(8))
    assert not cluster.workers["d0"].policy.seqs
    for driver in cluster.workers.values():
        driver.policy.pool.check()


def test_an_offer_whose_lease_is_over_is_void(cluster: LocalCluster) -> None:
    """The reader is late: it hears so, computes the KV itself, and the answer is the same."""
    answer = halfway(cluster)
    source, sink = cluster.workers["p0"], cluster.workers["d0"]
    while RID in source.policy.seqs and source.policy.seqs[RID].emitted == 0:
        cluster.step()
    now = cluster.clock()
    source._clock = lambda: now + 1000
    source.on(Tick())
    assert RID not in source.policy.source
    is_right(cluster, answer)
    assert sink.policy.num_preempted == 0


def test_a_read_that_failed_is_said_by_the_requests_name(
    cluster: LocalCluster, caplog: pytest.LogCaptureFixture
) -> None:
    cluster.workers["p0"]._ports.checksum = lambda blocks: np.zeros(len(blocks), np.uint64)  # type: ignore
    is_right(cluster, cluster.submit(PROMPT, 20, Sampling()))
    line = next(record for record in caplog.records if record.getMessage().startswith("KV could not be read: "))
    assert line.fields == {"request": "request-1", "attempt": RID}  # type: ignore[attr-defined]


def test_a_preemption_is_said_by_the_requests_name(cluster: LocalCluster, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        answers = [cluster.submit([i, *PROMPT], 60, Sampling()) for i in range(30)]
        cluster.run_until(answers)
    drivers = cluster.workers.values()
    lines = [record.fields for record in caplog.records if record.getMessage().startswith("preempted")]  # type: ignore[attr-defined]
    assert len(lines) == sum(driver.policy.num_preempted for driver in drivers) > 0
    assert {fact["request"] for fact in lines} <= {f"request-{i + 1}" for i in range(30)}


def test_a_second_last_part_is_refused(cluster: LocalCluster) -> None:
    """Its first token would be written twice."""
    answer = halfway(cluster)
    while cluster.workers["d0"]._held[RID].expects:
        cluster.step()
    with pytest.raises(ProtocolError, match="nothing .* is to be published"):
        cluster.workers["d0"].told("p0", Publish("p0", RID, (), len(PROMPT), True), NO_PERMIT + pack_ids([5]))
    is_right(cluster, answer)


BAD: list[tuple[Any, bytes]] = [
    (Publish("p0", RID, (1 << 31,), 16, False), NO_PERMIT + bytes(8)),
    (Publish("p0", RID, (1,), 16, False), b""),
    (Publish("p0", RID, (1,), 16, False), bytes(8)),
    (Publish("p0", RID, (1,), 16, False), NO_PERMIT),
    (Publish("p0", RID, (1,), 16, False), NO_PERMIT + bytes(12)),
    (Publish("p0", RID, (), 16, False), NO_PERMIT[1:]),
    (Publish("p0", RID, (1,), 16, True), NO_PERMIT + bytes(8)),
    (Publish("p0", RID, (1,), 16, True), NO_PERMIT + bytes(8) + pack_ids([1 << 30])),
    (Replicate("p0", RID, 0, (1, 2), (b"x" * 16,)), NO_PERMIT + bytes(16)),
    (Replicate("p0", RID, 0, (1,), (b"x",)), NO_PERMIT + bytes(8)),
    (Replicate("p0", RID, 0, (1,), (b"x" * 16,)), b""),
    (Replicate("p0", RID, 0, (1,), (b"x" * 16,)), bytes(8)),
    (Replicate("p0", RID, 0, (1,), (b"x" * 16,)), NO_PERMIT),
]


@pytest.mark.parametrize(("said", "attachment"), BAD)
def test_what_is_not_whole_changes_nothing(cluster: LocalCluster, said: Any, attachment: bytes) -> None:
    answer = halfway(cluster)
    with pytest.raises(ProtocolError):
        cluster.workers["d0"].told("p0", said, attachment)
    is_right(cluster, answer)


def test_kv_that_does_not_add_up_is_computed_here(cluster: LocalCluster) -> None:
    """More tokens than the request has would wait for memory that no pool has."""
    answer = halfway(cluster)
    blocks = tuple(range(40))
    cluster.workers["d0"].told("p0", Publish("p0", RID, blocks, 16 * 41, False), NO_PERMIT + bytes(8 * 40))
    assert cluster.workers["d0"].policy.sink.get(RID).broken  # type: ignore[union-attr]
    is_right(cluster, answer)


def test_a_block_that_is_named_twice_is_not_kept(cluster: LocalCluster) -> None:
    answer = halfway(cluster)
    cluster.run_until([answer])
    source = cluster.workers["p0"]
    kept = source.policy.keep._kept.get(1)
    if kept is not None:
        said = Replicate("d0", RID, len(kept.hashes), (3, 3), (b"x" * 16, b"y" * 16))
        source.told("d0", said, NO_PERMIT + bytes(16))
    cluster.settle()
    source.on(PeerLost("d0"))
    source.policy.pool.check()
