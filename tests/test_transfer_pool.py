"""Pools: shared memory that a reader cannot harm, and that cannot be pulled from under a reader."""

import mmap
import os

import pytest

from diptych.errors import ConfigError, ProtocolError
from diptych.transfer.layout import Layout
from diptych.transfer.pool import Pool

LAYOUT = Layout.uniform(layers=2, kv_heads=2, head_dim=8, block_size=16, dtype="float32", model="m")


def test_what_the_owner_writes_the_attached_pool_shows() -> None:
    pool = Pool(LAYOUT, 10)
    reader = Pool.attach(pool.fd, LAYOUT, 10)
    assert pool.view.shape == reader.view.shape == (10, LAYOUT.block_bytes)
    assert pool.address == pool.view[0].ctypes.data and not reader.view.any()
    pool.view[7, 3] = 42
    assert reader.view[7, 3] == 42
    reader.close()
    pool.close()


def test_a_reader_cannot_write() -> None:
    pool = Pool(LAYOUT, 4)
    reader = Pool.attach(pool.fd, LAYOUT, 4)
    with pytest.raises(ValueError, match="read-only"):
        reader.view[0, 0] = 1
    with pytest.raises(PermissionError):
        mmap.mmap(pool.fd, LAYOUT.block_bytes, mmap.MAP_SHARED)  # sealed: the descriptor gives no write access either
    reader.close()
    pool.close()


def test_the_file_cannot_shrink_under_a_reader() -> None:
    pool = Pool(LAYOUT, 4)
    with pytest.raises(PermissionError):
        os.ftruncate(pool.fd, 0)
    pool.close()


def test_attach_believes_the_file_not_the_peer() -> None:
    pool = Pool(LAYOUT, 4)
    for claimed in (3, 5, 1 << 30):
        with pytest.raises(ProtocolError, match="bytes, not"):
            Pool.attach(pool.fd, LAYOUT, claimed)
    pool.close()


def test_attach_refuses_memory_that_could_shrink() -> None:
    fd = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 4 * LAYOUT.block_bytes)
    with pytest.raises(ProtocolError, match="sealed"):
        Pool.attach(fd, LAYOUT, 4)
    os.close(fd)


def test_a_pool_has_blocks() -> None:
    for count in (0, -1, 1 << 31):
        with pytest.raises(ConfigError):
            Pool(LAYOUT, count)


def test_closing_is_idempotent_and_waits_for_whoever_still_looks() -> None:
    pool = Pool(LAYOUT, 4)
    block = pool.view[2]
    block[:] = 9
    pool.close()
    pool.close()
    assert pool.closed and block.all()  # still mapped: the view keeps it
    with pytest.raises(ProtocolError, match="closed"):
        _ = pool.view
    with pytest.raises(ProtocolError, match="closed"):
        _ = pool.address


def test_a_thousand_pools_leave_no_descriptor() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(1000):
        pool = Pool(LAYOUT, 1)
        Pool.attach(pool.fd, LAYOUT, 1).close()
        pool.close()
    assert len(os.listdir("/proc/self/fd")) == before
