"""What peers' words bring with them stays as long as policy wants it, and no longer."""

import numpy as np
import pytest

from diptych.errors import ProtocolError
from diptych.policy.messages import Publish
from diptych.policy.retention import Replicate
from diptych.serve.attached import MAX_PARTS, Attached
from diptych.transfer.seam import NO_PERMIT, PERMIT_BYTES

PERMIT = bytes(range(PERMIT_BYTES))


def replicate(attached: Attached, rid: int, *blocks: int, peer: str = "d0") -> None:
    hashes = tuple(bytes(16) for _ in blocks)
    attached.replicated(Replicate(peer, rid, 0, blocks, hashes), PERMIT + np.array(blocks, np.uint64).tobytes())


def publish(attached: Attached, rid: int, peer: str = "p0") -> None:
    attached.published(Publish(peer, rid, (1,), 16, False), PERMIT + bytes(8))


def test_a_block_is_taken_once() -> None:
    attached = Attached()
    replicate(attached, 64, 3, 5)
    replicate(attached, 64, 7)
    assert attached.take("d0", 64, (3, 5)) == (PERMIT, [3, 5])
    assert attached.take("d0", 64, (7, 7)) == (PERMIT, [7, 0])
    assert attached.take("d0", 64, (7,)) == (NO_PERMIT, [0]) and not len(attached)


def test_what_is_refused_or_whose_peer_is_gone_leaves_nothing() -> None:
    attached = Attached()
    for rid in range(100):
        replicate(attached, rid, 1, 2)
        attached.dropped("d0", rid)
    replicate(attached, 200, 1)
    replicate(attached, 200, 1, peer="d1")
    attached.forget_peer("d0")
    assert len(attached) == 1 and attached.take("d1", 200, (1,)) == (PERMIT, [1])


def test_what_came_too_early_is_claimed_by_its_place_however_many_others_came() -> None:
    """A stranger's thousand attempts do not push an honest one out."""
    attached = Attached()
    publish(attached, 64)
    for rid in range(1000, 5000):
        publish(attached, rid, "evil")
    publish(attached, 64, "evil")
    attached.dropped("evil", 64)
    ((event, attachment),) = attached.claim(64)
    assert event.peer == "p0" and attachment == PERMIT + bytes(8)
    assert attached.claim(64) == []
    for rid in range(1000, 5000):
        attached.dropped("evil", rid)
    assert not len(attached)


def test_parts_of_one_attempt_are_bounded() -> None:
    attached = Attached()
    for _ in range(MAX_PARTS):
        attached.expect_part(7)
        publish(attached, 7)
    with pytest.raises(ProtocolError, match="1024 parts"):
        attached.expect_part(7)
