"""What every KV transport must do, whatever carries the bytes: one suite, run over each of them.

| must | local, shm, tcp: here | what needs processes |
|---|---|---|
| random plans bit-exact | `random_plans_are_exact` | `test_live_tcp`, `test_live_paced` (oracle) |
| layer range, head slice | `layer_ranges_and_head_slices`, `one_head_slice` | |
| kill -9 of the source | | `test_transfer_shm`, `test_transfer_tcp`: idle, in a read, in the middle of a reply |
| kill -9 of the reader | | `test_live_aborts` (by EOF, not by lease), `test_transfer_tcp::a_reader_that_dies` |
| SIGSTOP of the source | | `test_transfer_shm::a_stopped_source`, `test_transfer_tcp::a_stopped_source` |
| SIGSTOP of the reader | | `test_live_aborts` (its leases end; then it computes what it missed) |
| abort at each stage | `cancelled_before`, `_while_copying`, `_after_the_end`, `whenever_it_was` | `test_live_aborts` |
| expired lease | `deadline_fails_a_read` | `test_serve_worker`, `test_policy_worker`, `test_live_aborts` |
| same name, new incarnation | `the_same_name_again` | `test_transfer_shm`, `test_transfer_tcp` |
| layout mismatch, readable | `pools_that_do_not_fit` | `test_live_hosts::who_does_not_fit` |
| 1,000 aborts leave nothing | `a_thousand_cancelled_reads` (memory, too) | `test_live_aborts` (0 blocks, memory) |
| refused without its permit | `a_read_is_refused_by_its_permit` (not over shared memory) | `test_live_tcp` |
| idle CPU | | `test_live_aborts` (whole workers, CPU time of 2.5 s) |
"""

import asyncio
import contextlib
import gc
import os
import tempfile
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.errors import ConfigError, LayoutMismatch, PeerLost, ProtocolError, TransferError
from diptych.transfer import native
from diptych.transfer.emulated import EmulatedTransport
from diptych.transfer.layout import Layout
from diptych.transfer.local import LocalRegistry, LocalTransport
from diptych.transfer.native import sockets
from diptych.transfer.pool import Pool
from diptych.transfer.reading import ThreadedPeer
from diptych.transfer.seam import PERMIT_BYTES, Plan, Transfer, Transport
from diptych.transfer.shm import ShmTransport
from diptych.transfer.tcp import TcpTransport

LAYOUT = Layout.uniform(layers=3, kv_heads=4, head_dim=8, block_size=4, dtype="float32", model="m")
NUM_BLOCKS = 24
PERMIT = bytes(range(PERMIT_BYTES))
permitted = partial(Plan, permit=PERMIT)
Make = Callable[[str, int], Transport]


@pytest.fixture(params=["local", "shm", "tcp", "shm, linked", "tcp, linked"])
def make(request: pytest.FixtureRequest) -> Iterator[Make]:
    """Makes transports of one kind that can reach each other."""
    registry = LocalRegistry()
    with tempfile.TemporaryDirectory(prefix="kv") as folder:  # short: a socket path has 107 bytes
        kinds: dict[str, Make] = {
            "local": lambda worker, incarnation: LocalTransport(worker, incarnation, registry),
            "shm": lambda worker, incarnation: ShmTransport(worker, incarnation, Path(folder) / "run"),
            "tcp": lambda worker, incarnation: TcpTransport(worker, incarnation, "secret", "127.0.0.1:0"),
        }
        kind, _, linked = request.param.partition(", ")
        make = kinds[kind]
        yield (lambda *who: EmulatedTransport(make(*who), lambda _: 1e15)) if linked else make


@dataclass
class Pair:
    """A decode worker connected to a prefill worker whose pool is full of noise."""

    prefill: Transport
    decode: Transport
    source: Pool
    target: Pool
    peer: ThreadedPeer
    offered: set[int]  # what PERMIT is good for; at first all blocks
    gate: "Gate" = field(default_factory=lambda: Gate())

    def plan(self, source: list[int], target: list[int], verify: bool = True) -> Plan:
        blocks = np.array(source, dtype=np.int32)
        sums = self.prefill.checksum(blocks) if verify else None
        return permitted(blocks, np.array(target, dtype=np.int32), sums)

    def hold_thread(self) -> None:
        """Keep the peer's copy thread busy until the gate opens, so that reads queue behind it."""
        self.peer._thread.submit(self.gate.wait)


@dataclass
class Gate:
    """Two events between a copy thread and a test."""

    entered: threading.Event = field(default_factory=threading.Event)
    opened: threading.Event = field(default_factory=threading.Event)

    def wait(self) -> None:
        self.entered.set()
        assert self.opened.wait(30)


@contextlib.asynccontextmanager
async def connected(make: Make, num_blocks: int = NUM_BLOCKS) -> AsyncIterator[Pair]:
    prefill, decode = make("prefill-0", 1), make("decode-0", 1)
    source, target = Pool(LAYOUT, num_blocks), Pool(LAYOUT, num_blocks)
    source.view[:] = np.random.default_rng(0).integers(0, 256, source.view.shape, dtype=np.uint8)
    offered = set(range(num_blocks))
    prefill.register(source, lambda permit, blocks: permit == PERMIT and offered.issuperset(blocks))
    decode.register(target)
    peer = await decode.connect(prefill.describe())
    assert isinstance(peer, ThreadedPeer)
    pair = Pair(prefill, decode, source, target, peer, offered)
    try:
        yield pair
    finally:
        pair.gate.opened.set()
        await decode.close()
        await prefill.close()
        source.close()
        target.close()


def scenario(make: Make, story: Callable[[Pair], Awaitable[None]], num_blocks: int = NUM_BLOCKS) -> None:
    """Run a story about a connected pair, with a limit on its length."""

    async def main() -> None:
        async with asyncio.timeout(30), connected(make, num_blocks) as pair:
            await story(pair)

    asyncio.run(main())


async def settled(transfer: Transfer) -> None:
    """Wait for `settled` without cancelling it."""
    await asyncio.wait_for(asyncio.shield(transfer.settled), 10)


async def in_thread(function: Callable[[], object]) -> None:
    await asyncio.get_running_loop().run_in_executor(None, function)


@pytest.fixture
def slow_copy(monkeypatch: pytest.MonkeyPatch) -> Gate:
    """Stops every read right before its first byte lands, inside the peer's thread, until the gate opens."""
    gate = Gate()

    def slow(real: Callable[..., int]) -> Callable[..., int]:
        def wait(*args: object) -> int:
            gate.wait()
            return real(*args)

        return wait

    monkeypatch.setattr(native, "copy_blocks", slow(native.copy_blocks))
    monkeypatch.setattr(sockets, "receive", slow(sockets.receive))
    return gate


# --- exact ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["native", "numpy"])
def test_random_plans_are_exact_and_touch_nothing_else(make: Make, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "numpy":
        monkeypatch.setattr(native, "library", lambda: None)

    async def story(pair: Pair) -> None:
        rng = np.random.default_rng(1)
        for _ in range(40):
            n = int(rng.integers(0, NUM_BLOCKS + 1))
            origin, to = rng.integers(0, NUM_BLOCKS, n), rng.permutation(NUM_BLOCKS)[:n]
            expected = pair.target.view.copy()
            expected[to] = pair.source.view[origin]
            stats = await pair.peer.read(pair.plan(origin.tolist(), to.tolist(), verify=n % 2 == 0), 10).done()
            assert stats.num_bytes == n * LAYOUT.block_bytes and stats.elapsed_s >= 0
            assert (pair.target.view == expected).all()
            pair.target.view[:] = rng.integers(0, 256)

    scenario(make, story)


@given(data=st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[])
def test_layer_ranges_and_head_slices_are_exact(data: st.DataObject) -> None:
    """Over the local transport: the copy itself is the same for all."""
    registry = LocalRegistry()
    span = lambda count: st.tuples(st.integers(0, count - 1), st.integers(1, count)).filter(lambda r: r[0] < r[1])  # noqa: E731
    layers = data.draw(st.none() | span(3))
    heads = data.draw(st.none() | span(4))

    async def story(pair: Pair) -> None:
        ids = np.array([5, 0, 23], dtype=np.int32), np.array([1, 22, 7], dtype=np.int32)
        stats = await pair.peer.read(permitted(*ids, layers=layers, heads=heads), 10).done()
        _expect_slices(pair, *ids, layers, heads, stats.num_bytes)

    scenario(lambda worker, incarnation: LocalTransport(worker, incarnation, registry), story)


def _expect_slices(
    pair: Pair,
    source: native.Ids,
    target: native.Ids,
    layers: tuple[int, int] | None,
    heads: tuple[int, int] | None,
    num_bytes: int,
) -> None:
    shape = (NUM_BLOCKS, *LAYOUT.shape)
    there, here = (pool.view.view(np.uint32).reshape(shape) for pool in (pair.source, pair.target))
    where = slice(*(layers or (0, 3))), slice(None), slice(*(heads or (0, 4)))
    expected = np.zeros(shape, dtype=np.uint32)
    for origin, to in zip(source, target, strict=True):
        expected[to][where] = there[origin][where]
    assert (here == expected).all()
    assert num_bytes == 3 * there[0][where].nbytes


def test_one_head_slice_over_every_transport(make: Make) -> None:
    async def story(pair: Pair) -> None:
        ids = np.array([3, 4, 5], dtype=np.int32), np.array([0, 9, 8], dtype=np.int32)
        stats = await pair.peer.read(permitted(*ids, layers=(1, 3), heads=(2, 4)), 10).done()
        _expect_slices(pair, *ids, (1, 3), (2, 4), stats.num_bytes)

    scenario(make, story)


def test_many_reads_at_once_all_arrive(make: Make) -> None:
    async def story(pair: Pair) -> None:
        reads = [pair.peer.read(pair.plan([23 - i], [i]), 10) for i in range(NUM_BLOCKS)]
        await asyncio.gather(*(read.done() for read in reads))
        assert (pair.target.view == pair.source.view[::-1]).all()
        assert all(read.settled.done() for read in reads)

    scenario(make, story)


# --- verified ---------------------------------------------------------------------------------------------------


def test_a_block_that_changed_after_its_checksum_is_noticed(make: Make) -> None:
    async def story(pair: Pair) -> None:
        plan = pair.plan([4, 5, 6], [0, 1, 2])
        pair.source.view[5, 17] ^= 1
        read = pair.peer.read(plan, 10)
        with pytest.raises(TransferError, match="checksum differs for 1 of 3 blocks, .*block 5"):
            await read.done()
        await settled(read)
        assert (await pair.peer.read(pair.plan([4, 5, 6], [0, 1, 2]), 10).done()).num_bytes  # the peer lives on

    scenario(make, story)


def test_swapped_checksums_are_noticed(make: Make) -> None:
    async def story(pair: Pair) -> None:
        plan = pair.plan([4, 5], [0, 1])
        assert plan.checksums is not None
        with pytest.raises(TransferError, match="checksum differs for 2 of 2"):
            await pair.peer.read(permitted(plan.source, plan.target, plan.checksums[::-1]), 10).done()

    scenario(make, story)


# --- refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "target", "extra"),
    [
        ([NUM_BLOCKS], [0], {}),
        ([-1], [0], {}),
        ([0], [NUM_BLOCKS], {}),
        ([0], [-1], {}),
        ([0, 1], [0], {}),
        ([0, 1], [3, 3], {}),
        ([0], [0], {"layers": (2, 9)}),
        ([0], [0], {"heads": (1, 1)}),
        ([0], [0], {"heads": (0, 2), "checksums": np.zeros(1, np.uint64)}),
        ([0], [0], {"checksums": np.zeros(2, np.uint64)}),
        ([0], [0], {"permit": PERMIT[:-1]}),
    ],
)
def test_impossible_plans_fail_settled_and_untouched(
    make: Make, source: list[int], target: list[int], extra: dict[str, object]
) -> None:
    async def story(pair: Pair) -> None:
        ids = np.array(source, dtype=np.int32), np.array(target, dtype=np.int32)
        read = pair.peer.read(permitted(*ids, **extra), 10)  # type: ignore[arg-type]
        assert read.settled.done()
        with pytest.raises(ProtocolError):
            await read.done()
        assert not pair.target.view.any()

    scenario(make, story)


def test_a_read_is_refused_by_its_permit_and_the_next_one_is_not(make: Make) -> None:
    """Over shared memory nobody is asked."""

    async def story(pair: Pair) -> None:
        pair.offered.discard(6)
        forged = replace(pair.plan([4, 5], [2, 3]), permit=PERMIT[::-1])
        for plan in (forged, pair.plan([5, 6], [4, 7])):
            read = pair.peer.read(plan, 10)
            if pair.peer.lane == "shm":
                await read.done()
                continue
            with pytest.raises(TransferError, match="does not offer these blocks by this permit") as refusal:
                await read.done()
            assert refusal.type is TransferError
            await settled(read)
            assert not pair.target.view[plan.target].any()
            await pair.peer.read(pair.plan([4, 5], [0, 1]), 10).done()
        assert not pair.peer.lost.done()

    scenario(make, story)


def test_a_plan_is_what_it_was_when_the_read_began(make: Make) -> None:
    async def story(pair: Pair) -> None:
        pair.hold_thread()
        plan = pair.plan([1], [1])
        read = pair.peer.read(plan, 10)
        plan.source[0], plan.target[0] = 1 << 30, 1 << 30
        pair.gate.opened.set()
        await read.done()
        assert (pair.target.view[1] == pair.source.view[1]).all()

    scenario(make, story)


def test_pools_that_do_not_fit_are_refused_with_both_cards(make: Make) -> None:
    async def main() -> None:
        other = Layout.uniform(layers=3, kv_heads=4, head_dim=8, block_size=4, dtype="float16", model="m")
        pools = Pool(LAYOUT, 2), Pool(other, 2)
        prefill, decode = make("prefill-0", 1), make("decode-0", 1)
        prefill.register(pools[0])
        decode.register(pools[1])
        with pytest.raises(LayoutMismatch, match="dtype is 'float16' here and 'float32' there") as refusal:
            await decode.connect(prefill.describe())
        assert LAYOUT.card() in str(refusal.value) and other.card() in str(refusal.value)
        await asyncio.gather(decode.close(), prefill.close())

    asyncio.run(main())


def test_descriptions_are_not_believed(make: Make) -> None:
    async def story(pair: Pair) -> None:
        good = pair.prefill.describe()
        for bad in (b"", b"\x80", good[:-1], good + b"x", good.replace(b"worker", b"wirker"), b"\x00" * (1 << 17)):
            with pytest.raises(ProtocolError):
                await pair.decode.connect(bad)

    scenario(make, story)


def test_nothing_works_before_a_pool_is_registered(make: Make) -> None:
    async def main() -> None:
        transport = make("prefill-0", 1)
        with pytest.raises(ConfigError, match="not registered"):
            transport.describe()
        with pytest.raises(ConfigError, match="not registered"):
            transport.checksum(np.zeros(1, np.int32))
        await transport.close()

    asyncio.run(main())


# --- stopped ----------------------------------------------------------------------------------------------------


def test_cancelled_before_it_began_it_settles_at_once_and_never_copies(make: Make) -> None:
    async def story(pair: Pair) -> None:
        pair.hold_thread()
        read = pair.peer.read(pair.plan([1, 2], [1, 2]), 10)
        read.cancel()
        assert read.settled.done()
        with pytest.raises(TransferError, match="cancelled"):
            await read.done()
        pair.gate.opened.set()
        await pair.peer.read(pair.plan([3], [3]), 10).done()  # the thread has passed the cancelled one
        assert not pair.target.view[:3].any()

    scenario(make, story)


def test_cancelled_while_copying_it_settles_only_when_the_copy_returned(make: Make, slow_copy: Gate) -> None:
    async def story(pair: Pair) -> None:
        read = pair.peer.read(pair.plan([1, 2], [1, 2]), 10)
        await in_thread(slow_copy.entered.wait)
        read.cancel()
        with pytest.raises(TransferError, match="cancelled"):
            await read.done()
        assert not read.settled.done()  # the thread is still in there: the blocks are not free
        slow_copy.opened.set()
        await settled(read)
        assert not pair.target.view.any()

    scenario(make, story)


def test_after_settled_nothing_lands_whenever_it_was_cancelled(make: Make) -> None:
    async def story(pair: Pair) -> None:
        everything = list(range(pair.source.num_blocks))
        for round_ in range(30):
            read = pair.peer.read(pair.plan(everything, everything[::-1], verify=False), 10)
            await asyncio.sleep(round_ * 1e-5)
            read.cancel()
            await settled(read)
            pair.target.view[:] = 1  # somebody else's now
            pair.source.view[:] = round_ + 2
            await asyncio.sleep(0.001)
            assert (pair.target.view == 1).all()

    scenario(make, story, num_blocks=2000)


def test_cancelled_after_the_end_nothing_changes(make: Make) -> None:
    async def story(pair: Pair) -> None:
        read = pair.peer.read(pair.plan([1], [1]), 10)
        stats = await read.done()
        read.cancel()
        read.cancel()
        assert await read.done() == stats and read.settled.done()

    scenario(make, story)


def test_the_deadline_fails_a_read_but_only_the_copy_settles_it(make: Make, slow_copy: Gate) -> None:
    async def story(pair: Pair) -> None:
        read = pair.peer.read(pair.plan([1], [1]), 0.05)
        with pytest.raises(TransferError, match="deadline of 0.05 s"):
            await read.done()
        assert not read.settled.done()
        slow_copy.opened.set()
        await settled(read)
        assert not pair.target.view.any()

    scenario(make, story)


def test_the_deadline_counts_time_in_the_queue(make: Make) -> None:
    async def story(pair: Pair) -> None:
        pair.hold_thread()
        for deadline_s in (0.02, 0.0, -1.0):
            read = pair.peer.read(pair.plan([1], [1]), deadline_s)
            with pytest.raises(TransferError, match="deadline"):
                await read.done()
            assert read.settled.done()

    scenario(make, story)


def test_whoever_gives_up_waiting_does_not_stop_the_read(make: Make, slow_copy: Gate) -> None:
    async def story(pair: Pair) -> None:
        read = pair.peer.read(pair.plan([1], [1]), 10)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(read.done(), 0.02)
        slow_copy.opened.set()
        await read.done()
        assert (pair.target.view[1] == pair.source.view[1]).all()

    scenario(make, story)


def test_a_failing_copy_is_a_failed_read_not_a_hang(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise MemoryError("no room")

    monkeypatch.setattr(native, "copy_blocks", fail)
    monkeypatch.setattr(sockets, "receive", fail)

    async def story(pair: Pair) -> None:
        read = pair.peer.read(pair.plan([1], [1]), 10)
        with pytest.raises(TransferError, match="no room"):
            await read.done()
        await settled(read)

    scenario(make, story)


# --- lost and closed --------------------------------------------------------------------------------------------


def test_a_closed_peer_fails_its_reads_and_takes_no_more(make: Make, slow_copy: Gate) -> None:
    async def story(pair: Pair) -> None:
        reads = [pair.peer.read(pair.plan([i], [i]), 10) for i in range(3)]
        await in_thread(slow_copy.entered.wait)
        closing = asyncio.create_task(pair.peer.close())
        for read in reads:
            with pytest.raises(PeerLost):
                await read.done()
        assert [read.settled.done() for read in reads] == [False, True, True] and not closing.done()
        slow_copy.opened.set()
        await closing
        assert reads[0].settled.done() and pair.peer.lost.result() == "closed on this side"
        late = pair.peer.read(pair.plan([1], [1]), 10)
        assert late.settled.done()
        with pytest.raises(PeerLost):
            await late.done()
        await pair.peer.close()
        assert not pair.target.view.any()

    scenario(make, story)


def test_a_source_that_closes_lets_reads_finish(make: Make, slow_copy: Gate) -> None:
    async def story(pair: Pair) -> None:
        read = pair.peer.read(pair.plan([1, 2], [1, 2]), 10)
        await in_thread(slow_copy.entered.wait)
        closing = asyncio.create_task(pair.prefill.close(drain_s=10))
        assert "clos" in await asyncio.wait_for(asyncio.shield(pair.peer.lost), 5)
        with pytest.raises(PeerLost):
            await pair.peer.read(pair.plan([3], [3]), 10).done()
        await asyncio.sleep(0.02)
        assert not closing.done()  # it waits for us
        slow_copy.opened.set()
        await read.done()
        await closing
        assert (pair.target.view[1:3] == pair.source.view[1:3]).all() and not pair.target.view[3].any()

    scenario(make, story)


def test_a_reader_that_closes_finishes_what_it_reads(make: Make, slow_copy: Gate) -> None:
    async def story(pair: Pair) -> None:
        read = pair.peer.read(pair.plan([1], [1]), 10)
        await in_thread(slow_copy.entered.wait)
        closing = asyncio.create_task(pair.decode.close(drain_s=10))
        await asyncio.sleep(0.01)
        assert not closing.done()
        slow_copy.opened.set()
        assert (await read.done()).num_bytes == LAYOUT.block_bytes
        await closing

    scenario(make, story)


def test_draining_has_an_end(make: Make, slow_copy: Gate) -> None:
    async def story(pair: Pair) -> None:
        read = pair.peer.read(pair.plan([1], [1]), 10)
        await in_thread(slow_copy.entered.wait)
        closing = asyncio.create_task(pair.decode.close(drain_s=0.02))
        with pytest.raises(PeerLost):
            await read.done()
        slow_copy.opened.set()
        await closing
        assert read.settled.done() and not pair.target.view.any()

    scenario(make, story)


def test_the_same_name_again_is_another_worker(make: Make) -> None:
    async def story(pair: Pair) -> None:
        before = pair.prefill.describe()
        await pair.prefill.close()
        await asyncio.wait_for(asyncio.shield(pair.peer.lost), 5)
        with pytest.raises(PeerLost):
            await pair.decode.connect(before, timeout_s=2)
        pool = Pool(LAYOUT, 5)
        pool.view[:] = 7
        again = make("prefill-0", 2)
        again.register(pool)
        peer = await pair.decode.connect(again.describe())
        await peer.read(
            permitted(np.array([4], np.int32), np.array([0], np.int32), again.checksum(np.array([4]))), 10
        ).done()
        assert (pair.target.view[0] == 7).all() and not peer.lost.done()
        await again.close()
        pool.close()

    scenario(make, story)


def test_a_thousand_cancelled_reads_leave_nothing_behind(make: Make) -> None:
    async def story(pair: Pair) -> None:
        everything = list(range(NUM_BLOCKS))
        plan = pair.plan(everything, everything)

        async def storm(count: int) -> None:
            for i in range(count):
                read = pair.peer.read(plan, 10)
                if i % 3:
                    await asyncio.sleep(0)
                read.cancel()
                await settled(read)

        await storm(200)
        before = _belongings()
        await storm(1000)
        after = _belongings()
        assert after[:3] == before[:3]  # threads, descriptors, reads under way
        assert after[3] - before[3] < 4 << 20

    def _belongings() -> tuple[int, int, int, int]:
        gc.collect()
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
        return threading.active_count(), len(os.listdir("/proc/self/fd")), len(peers[0].under_way), resident

    peers: list[ThreadedPeer] = []

    async def main(pair: Pair) -> None:
        peers.append(pair.peer)
        await story(pair)

    scenario(make, main)


def test_connecting_again_and_again_leaves_nothing_behind(make: Make) -> None:
    async def story(pair: Pair) -> None:
        async def visit() -> None:
            peer = await pair.decode.connect(pair.prefill.describe())
            await peer.read(pair.plan([1], [1]), 10).done()
            await peer.close()
            await asyncio.sleep(0.002)  # the source notices, and the idle thread ends

        for _ in range(5):
            await visit()
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(50):
            await visit()
        gc.collect()
        assert len(os.listdir("/proc/self/fd")) <= before + 2
        assert threading.active_count() < 10

    scenario(make, story)
