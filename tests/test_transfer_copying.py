"""Reading without an event loop, as an in-process harness does."""

import numpy as np
import pytest

from diptych.errors import LayoutMismatch, ProtocolError, TransferError
from diptych.transfer.copying import checksum, prepare, read_now
from diptych.transfer.layout import Group, Layout
from diptych.transfer.pool import Pool
from diptych.transfer.seam import Plan

LAYOUT = Layout.uniform(layers=2, kv_heads=2, head_dim=8, block_size=4, dtype="bfloat16", model="m")


def ids(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int32)


def pools(layout: Layout = LAYOUT, other: Layout | None = None) -> tuple[Pool, Pool]:
    source, target = Pool(layout, 6), Pool(other or layout, 4)
    source.view[:] = np.random.default_rng(0).integers(0, 256, source.view.shape, dtype=np.uint8)
    return source, target


def test_read_now_copies_and_verifies() -> None:
    source, target = pools()
    stats = read_now(source, target, Plan(ids(5, 0), ids(1, 3), checksum(source, ids(5, 0))))
    assert stats.num_bytes == 2 * LAYOUT.block_bytes
    assert (target.view[[1, 3]] == source.view[[5, 0]]).all() and not target.view[[0, 2]].any()


def test_read_now_raises_what_a_transfer_would() -> None:
    source, target = pools()
    with pytest.raises(TransferError, match="checksum"):
        read_now(source, target, Plan(ids(5), ids(1), checksum(source, ids(4))))
    with pytest.raises(ProtocolError, match="source block ids 6 to 6"):
        read_now(source, target, Plan(ids(6), ids(1)))
    with pytest.raises(ProtocolError, match="target block ids 4 to 4"):
        read_now(source, target, Plan(ids(5), ids(4)))
    with pytest.raises(ProtocolError, match="twice"):
        read_now(source, target, Plan(ids(5, 4), ids(1, 1)))
    with pytest.raises(LayoutMismatch, match="model is 'n' here and 'm' there"):
        read_now(*pools(other=Layout(4, "bfloat16", LAYOUT.groups, "n")), Plan(ids(5), ids(1)))


def test_whole_blocks_of_many_groups_copy_but_slices_of_them_do_not_yet() -> None:
    layout = Layout(4, "float32", (Group((0, 2), 2, 8, 8), Group((1,), 1, 16, 0, "latent")), "m")
    source, target = pools(layout)
    read_now(source, target, Plan(ids(3), ids(0), checksum(source, ids(3))))
    assert (target.view[0] == source.view[3]).all()
    with pytest.raises(LayoutMismatch, match="one group"):
        read_now(source, target, Plan(ids(3), ids(0), layers=(0, 1)))


def test_a_set_flag_says_how_far_it_came() -> None:
    source, target = pools()
    with pytest.raises(TransferError, match="cancelled after 0 of 2 blocks"):
        prepare(source, target, Plan(ids(0, 1), ids(0, 1)), np.ones(1, dtype=np.int32)).run()
    assert not target.view.any()


def test_a_prepared_copy_outlives_its_pools() -> None:
    """A pool that is closed meanwhile must not turn a copy under way into a crash."""
    source, target = pools()
    seen = target.view
    copy = prepare(source, target, Plan(ids(2), ids(0)))
    source.close()
    target.close()
    assert copy.run().num_bytes == LAYOUT.block_bytes and seen[0].any()
    with pytest.raises(ProtocolError, match="closed"):
        prepare(source, target, Plan(ids(2), ids(0)))
