"""Emulated links: what they hold back, for how long, and that nobody else notices them. `test_transfer_contract.py`
holds every promise of a transport over them, too."""

import asyncio
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest

from diptych.config import load_cluster
from diptych.errors import TransferError
from diptych.serve.process import Orders
from diptych.serve.worker_process import kv_transport
from diptych.transfer.emulated import EmulatedTransport, Link
from diptych.transfer.layout import Layout
from diptych.transfer.local import LocalRegistry, LocalTransport
from diptych.transfer.pool import Pool
from diptych.transfer.reach import Transports
from diptych.transfer.seam import Plan

LAYOUT = Layout.uniform(layers=4, kv_heads=4, head_dim=64, block_size=16, dtype="float32", model="m")
GO = np.zeros(1, dtype=np.int32)


class Time:
    """A clock that moves when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 100.0

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_bytes_take_their_time_one_after_the_other() -> None:
    time = Time()
    link = Link(1000.0, time.clock, time.sleep)
    link.cross(GO, 500, began=100.0)
    assert time.now == pytest.approx(100.5)
    link.cross(GO, 250, began=100.0)  # came at the same time: waits for the first
    assert time.now == pytest.approx(100.75)
    time.now = 200.0
    link.cross(GO, 500, began=199.5)  # it took as long to come as the link would have
    assert time.now == 200.0
    link.cross(GO, 100, began=200.0)  # what was not used before is not saved up
    assert time.now == pytest.approx(200.1)


def test_many_threads_share_a_link() -> None:
    link = Link(1e6)
    threads = [threading.Thread(target=link.cross, args=(GO, 5000, link._clock())) for _ in range(4)]
    began = link._clock()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert link._clock() - began >= 0.018


def test_who_is_cancelled_waits_no_more() -> None:
    time, flag = Time(), np.zeros(1, dtype=np.int32)

    def sleep(seconds: float) -> None:
        time.sleep(seconds)
        flag[0] = 1

    with pytest.raises(TransferError, match="cancelled"):
        Link(1.0, time.clock, sleep).cross(flag, 1000, began=100.0)
    assert time.now < 101


def test_a_read_over_a_slow_link_is_exact_and_can_be_cancelled() -> None:
    async def main() -> None:
        registry = LocalRegistry()
        prefill = LocalTransport("prefill-0", 1, registry)
        decode = EmulatedTransport(LocalTransport("decode-0", 1, registry), {"prefill-0": 100e6}.get)
        pools = Pool(LAYOUT, 24), Pool(LAYOUT, 24)
        pools[0].view[:] = np.random.default_rng(0).integers(0, 256, pools[0].view.shape, dtype=np.uint8)
        prefill.register(pools[0])
        decode.register(pools[1])
        peer = await decode.connect(prefill.describe())
        ids = np.arange(24, dtype=np.int32)
        stats = await peer.read(Plan(ids, ids, prefill.checksum(ids)), 10).done()
        assert stats.elapsed_s >= 0.99 * stats.num_bytes / 100e6
        assert (pools[1].view == pools[0].view).all()
        read = peer.read(Plan(ids, ids), 10)
        await asyncio.sleep(0.01)
        read.cancel()
        await asyncio.wait_for(asyncio.shield(read.settled), 1)
        pools[1].view[:] = 0
        await asyncio.gather(decode.close(), prefill.close())
        assert not pools[1].view.any()

    asyncio.run(main())


def test_without_links_nothing_is_wrapped(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="kv") as folder:
        for flags, kind in (({}, Transports), ({"link": "10gbe"}, EmulatedTransport)):
            cluster = load_cluster(None, {"engine": "paced", **flags})
            orders = Orders(cluster, folder, "k" * 32, "d0")

            async def made(orders: Orders = orders) -> object:
                return kv_transport(orders)

            assert type(asyncio.run(made())) is kind
