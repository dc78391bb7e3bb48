"""KV over TCP between real processes and within one: death, stops, aborts and pipelining. Covers `tcp.py`, `stream.py`.

What all transports share is in the contract; who is let in, and what may be asked, in `test_transfer_serving.py`.
"""

import asyncio
import contextlib
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from diptych.errors import ConfigError, PeerLost, ProtocolError, TransferError
from diptych.transfer import stream
from diptych.transfer.layout import Layout
from diptych.transfer.native import sockets
from diptych.transfer.pool import Pool
from diptych.transfer.reading import ThreadedPeer
from diptych.transfer.seam import Codec, Plan, Readable, Transfer
from diptych.transfer.tcp import TcpTransport, split_address

LAYOUT = Layout.uniform(layers=2, kv_heads=2, head_dim=16, block_size=16, dtype="float32", model="m")
NUM_BLOCKS = 64

SOURCE = f"""
import asyncio, sys, time
from diptych.transfer import serving
from diptych.transfer.layout import Layout
from diptych.transfer.pool import Pool
from diptych.transfer.tcp import TcpTransport

def half(sock, head, payload):
    sock.sendall(head + bytes(payload.blocks[payload.ids[0]][:100]))
    print("half", flush=True)
    time.sleep(60)

async def main(incarnation, halves):
    layout = Layout.uniform(layers=2, kv_heads=2, head_dim=16, block_size=16, dtype="float32", model="m")
    pool = Pool(layout, {NUM_BLOCKS})
    pool.view[:] = incarnation
    transport = TcpTransport("prefill-0", incarnation, "secret", "127.0.0.1:0")
    transport.register(pool)
    if halves:
        serving.sockets.send = half
    print(transport.describe().hex(), flush=True)
    await asyncio.sleep(60)

asyncio.run(main(int(sys.argv[1]), len(sys.argv) > 2))
"""


class Source:
    """A prefill worker in a process of its own. Every byte of its pool is its incarnation."""

    def __init__(self, incarnation: int = 1, *extra: str):
        command = [sys.executable, "-c", SOURCE, str(incarnation), *extra]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, bufsize=1)
        self.description = bytes.fromhex(self.line())

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def stop(self) -> None:
        """Returns when every thread has stopped; where others need the cores that takes a moment."""
        self.process.send_signal(signal.SIGSTOP)
        tasks = Path(f"/proc/{self.process.pid}/task")
        while any(stat.read_text().rpartition(")")[2].split()[0] != "T" for stat in tasks.glob("*/stat")):
            time.sleep(0.001)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()


@pytest.fixture
def start() -> Iterator[Callable[..., Source]]:
    sources: list[Source] = []

    def start_one(incarnation: int = 1, *extra: str) -> Source:
        sources.append(Source(incarnation, *extra))
        return sources[-1]

    yield start_one
    for source in sources:
        source.kill()
        source.process.communicate()


@contextlib.asynccontextmanager
async def worker(
    name: str = "decode-0", listen: str = "127.0.0.1:0", readable: Readable | None = None
) -> AsyncIterator[tuple[TcpTransport, Pool]]:
    pool, transport = Pool(LAYOUT, NUM_BLOCKS), TcpTransport(name, 1, "secret", listen)
    transport.register(pool, readable)
    try:
        yield transport, pool
    finally:
        await transport.close(0.2)
        pool.close()


def run(story: Awaitable[None]) -> None:
    async def main() -> None:
        async with asyncio.timeout(30):
            await story

    asyncio.run(main())


def blocks(*ids: int) -> Plan:
    return Plan(np.array(ids, np.int32), np.array(ids, np.int32))


EVERYTHING = blocks(*range(NUM_BLOCKS))


async def settled(transfer: Transfer, within_s: float = 5.0) -> None:
    await asyncio.wait_for(asyncio.shield(transfer.settled), within_s)


async def reason(peer: ThreadedPeer, within_s: float = 5.0) -> str:
    return await asyncio.wait_for(asyncio.shield(peer.lost), within_s)


async def in_thread(function: Callable[[], object]) -> object:
    return await asyncio.get_running_loop().run_in_executor(None, function)


# --- the source dies, stops, comes back ----------------------------------------------------------------------------


def test_kill_9_is_noticed_and_new_reads_are_refused(start: Callable[..., Source]) -> None:
    async def story() -> None:
        async with worker() as (transport, pool):
            source = start()
            peer = await transport.connect(source.description)
            await peer.read(blocks(0), 10).done()
            assert (pool.view[0] == 1).all() and peer.lane == "tcp"
            source.kill()
            await reason(peer, within_s=1.0)
            read = peer.read(blocks(1), 10)
            assert read.settled.done()
            with pytest.raises(PeerLost, match="prefill-0"):
                await read.done()
            with pytest.raises(PeerLost, match="cannot be reached"):
                await transport.connect(source.description)
            assert not pool.view[1].any()

    run(story())


def test_kill_9_in_the_middle_of_a_reply_fails_the_reads_and_they_settle(start: Callable[..., Source]) -> None:
    async def story() -> None:
        async with worker() as (transport, _):
            source = start(1, "half")
            peer = await transport.connect(source.description)
            reads = [peer.read(EVERYTHING, 20), peer.read(blocks(1), 20)]
            assert await in_thread(source.line) == "half"
            source.kill()
            async with asyncio.timeout(1):
                for read in reads:
                    with pytest.raises(PeerLost):
                        await read.done()
                    await settled(read)
            assert peer.under_way == frozenset()

    run(story())


def test_a_stopped_source_meets_the_deadline_and_writes_nothing_after_it(start: Callable[..., Source]) -> None:
    """What must hold when it wakes up: blocks of a settled read are somebody else's."""

    async def story() -> None:
        async with worker() as (transport, pool):
            source = start(7)
            peer = await transport.connect(source.description)
            await peer.read(blocks(0), 10).done()
            source.stop()
            reads = [peer.read(EVERYTHING, deadline_s) for deadline_s in (0.05, 0.1)]
            for read in reads:
                with pytest.raises(TransferError, match="deadline of"):
                    await read.done()
                await settled(read)
            assert not peer.lost.done()  # that it hangs is for beats to notice
            with pytest.raises(PeerLost, match="did not answer within 0.1 s"):
                await transport.connect(source.description, timeout_s=0.1)
            pool.view[:] = 1
            source.go_on()
            await peer.read(blocks(5), 10).done()  # over the same connection, behind what nobody wants any more
            assert (pool.view[5] == 7).all() and (np.delete(pool.view, 5, axis=0) == 1).all()

    run(story())


def test_kill_9_of_a_stopped_source_is_the_end(start: Callable[..., Source]) -> None:
    async def story() -> None:
        async with worker() as (transport, _):
            source = start()
            peer = await transport.connect(source.description)
            source.stop()
            read = peer.read(EVERYTHING, 20)
            source.kill()
            async with asyncio.timeout(1):
                with pytest.raises(PeerLost):
                    await read.done()
                await settled(read)

    run(story())


def test_the_next_incarnation_is_read_not_the_last(start: Callable[..., Source]) -> None:
    async def story() -> None:
        async with worker() as (transport, pool):
            first = start(1)
            old = await transport.connect(first.description)
            first.kill()
            await reason(old)
            new = await transport.connect(start(2).description)
            await new.read(blocks(0), 10).done()
            assert (pool.view[0] == 2).all() and not new.lost.done()

    run(story())


def test_a_reader_that_dies_is_forgotten(start: Callable[..., Source]) -> None:
    reader = """
import asyncio, sys
from diptych.transfer.layout import Layout
from diptych.transfer.pool import Pool
from diptych.transfer.tcp import TcpTransport
async def main():
    layout = Layout.uniform(layers=2, kv_heads=2, head_dim=16, block_size=16, dtype="float32", model="m")
    transport = TcpTransport("decode-0", 1, "secret")
    transport.register(Pool(layout, 4))
    peer = await transport.connect(bytes.fromhex(sys.argv[1]))
    print("connected", flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""

    async def story() -> None:
        async with worker("prefill-0") as (transport, _):
            assert transport._server is not None
            command = [sys.executable, "-c", reader, transport.describe().hex()]
            with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
                assert process.stdout is not None
                await in_thread(process.stdout.readline)
                assert transport._server.num_readers == 1
                process.kill()
            while transport._server.num_readers:
                await asyncio.sleep(0.001)
            await asyncio.wait_for(transport._server._nobody.wait(), 5)

    run(story())


# --- aborts --------------------------------------------------------------------------------------------------------


class Pace:
    """Holds the owner's thread in the middle of its first reply until `go`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.half, self.go, self.num_sent = threading.Event(), threading.Event(), 0
        self._real = sockets.send
        monkeypatch.setattr(sockets, "send", self._send)

    def _send(self, sock: socket.socket, head: bytes, payload: sockets.Batch) -> None:
        self.num_sent += 1
        if self.half.is_set():
            self._real(sock, head, payload)
            return
        everything = head + payload.blocks[payload.ids].tobytes()
        middle = len(head) + LAYOUT.block_bytes // 2
        sock.sendall(everything[:middle])
        self.half.set()
        assert self.go.wait(20)
        sock.sendall(everything[middle:])


@contextlib.asynccontextmanager
async def connected(readable: Readable | None = None) -> AsyncIterator[tuple[ThreadedPeer, Pool, TcpTransport]]:
    async with worker("prefill-0", readable=readable) as (prefill, source), worker() as (decode, target):
        source.view[:] = np.arange(NUM_BLOCKS, dtype=np.uint8)[:, None] + 1
        yield await decode.connect(prefill.describe()), target, prefill


def test_a_cancelled_read_settles_although_the_source_is_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    pace = Pace(monkeypatch)

    async def story() -> None:
        async with connected() as (peer, target, prefill):
            try:
                read = peer.read(blocks(3, 4), 10)
                await in_thread(pace.half.wait)
                while not target.view[3].any():
                    await asyncio.sleep(0.001)
                read.cancel()
                await settled(read)  # half a block has landed, the other half is still to be sent
                target.view[:] = 200
            finally:
                pace.go.set()
            await peer.read(blocks(9), 10).done()
            assert (target.view[9] == 10).all() and (np.delete(target.view, 9, axis=0) == 200).all()
            assert prefill._server is not None and prefill._server.num_readers == 1  # the connection lives on

    run(story())


def test_what_nobody_wants_is_received_without_a_next_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the source would wait for a reader that takes nothing, and give it up."""
    pace = Pace(monkeypatch)

    async def story() -> None:
        async with connected() as (peer, _, _):
            read = peer.read(blocks(3, 4), 10)
            await in_thread(pace.half.wait)
            read.cancel()
            await settled(read)
            its = peer._prepare.__self__  # type: ignore[attr-defined]
            assert len(its._asked) == 1
            pace.go.set()
            while its._asked:
                await asyncio.sleep(0.001)

    run(story())


def test_a_stuck_source_does_not_keep_us_from_closing(monkeypatch: pytest.MonkeyPatch) -> None:
    pace = Pace(monkeypatch)

    async def story() -> None:
        async with connected() as (peer, _, _):
            try:
                read = peer.read(EVERYTHING, 10)
                await in_thread(pace.half.wait)
                await asyncio.wait_for(peer.close(), 5)
                assert read.settled.done()
                with pytest.raises(PeerLost, match="closed on this side"):
                    await read.done()
            finally:
                pace.go.set()

    run(story())


def test_a_reply_that_is_not_the_one_that_is_due_ends_the_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    real = sockets.send
    monkeypatch.setattr(sockets, "send", lambda sock, head, payload: real(sock, b"\1" + head[1:], payload))

    async def story() -> None:
        async with connected() as (peer, target, _):
            with pytest.raises((ProtocolError, PeerLost), match="not the reply to request 1"):
                await peer.read(blocks(3), 10).done()
            assert "not the reply" in await reason(peer)
            assert not target.view.any()

    run(story())


# --- refused -------------------------------------------------------------------------------------------------------


def test_a_refusal_of_what_was_cancelled_is_nobody_elses() -> None:
    go = threading.Event()

    def readable(permit: bytes, blocks: list[int]) -> bool:
        assert go.wait(20)
        return blocks != [2]

    async def story() -> None:
        async with connected(readable) as (peer, target, prefill):
            try:
                cancelled, behind = peer.read(blocks(2), 10), peer.read(blocks(7), 10)
                while not peer._prepare.__self__._asked:  # type: ignore[attr-defined]
                    await asyncio.sleep(0.001)
                cancelled.cancel()
                await settled(cancelled)
            finally:
                go.set()
            await behind.done()
            assert (target.view[7] == 8).all() and not target.view[2].any()

    run(story())


@pytest.mark.parametrize("codec", ["raw", "int8"])
def test_a_refusal_in_the_middle_ends_its_read_at_once_and_no_other(
    monkeypatch: pytest.MonkeyPatch, codec: Codec
) -> None:
    """What was asked for ahead is received without a next read, what was not is not asked for."""
    monkeypatch.setattr(stream, "BATCH_BYTES", LAYOUT.block_bytes)
    asked: list[int] = []

    def readable(permit: bytes, blocks: list[int]) -> bool:
        asked.extend(blocks)
        return blocks != [2]

    def plan(*ids: int) -> Plan:
        return replace(blocks(*ids), codec=codec)

    async def story() -> None:
        async with connected(readable) as (peer, target, prefill):
            for _ in range(3):
                target.view[:] = 0
                before, refused, behind = (peer.read(plan(*ids), 10) for ids in ((0, 1), (1, 2, 3, 4, 5, 6), (7, 8)))
                await before.done()
                with pytest.raises(TransferError, match="prefill-0 .* refused: it does not offer these blocks"):
                    await refused.done()
                assert refused.settled.done()
                assert not target.view[2:7].any()
                await behind.done()
                assert target.view[7].any() and target.view[8].any() and not target.view[2:7].any()
            assert not {5, 6} & set(asked) and not peer.lost.done()
            with pytest.raises(TransferError, match="refused"):
                await peer.read(plan(2, 3, 4, 5), 10).done()
            its = peer._prepare.__self__  # type: ignore[attr-defined]
            while its._asked:
                await asyncio.sleep(0.001)
            assert not its._planned or all(batch.fetch.flag[0] for batch in its._planned)
            assert prefill._server is not None and prefill._server.num_readers == 1

    run(story())


# --- many requests -------------------------------------------------------------------------------------------------


def test_the_next_read_is_asked_for_before_this_one_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    real, asked = sockets.send, []

    def send(sock: socket.socket, head: bytes, payload: sockets.Batch) -> None:
        if not asked:
            asked.append(bool(select.select([sock], [], [], 5)[0]))
        real(sock, head, payload)

    monkeypatch.setattr(sockets, "send", send)

    async def story() -> None:
        async with connected() as (peer, target, _):
            reads = [peer.read(blocks(i), 10) for i in range(2)]
            for read in reads:
                await read.done()
            assert asked == [True] and (target.view[1] == 2).all()

    run(story())


@pytest.mark.parametrize("how", ["native", "python"])
def test_plans_of_many_requests_are_exact(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr(stream, "BATCH_BYTES", 3 * LAYOUT.block_bytes)
    if how == "python":
        monkeypatch.setattr(sockets.native, "library", lambda: None)

    async def story() -> None:
        async with connected() as (peer, target, prefill):
            rng = np.random.default_rng(0)
            for _ in range(10):
                origin, to = rng.permutation(NUM_BLOCKS).astype(np.int32), rng.permutation(NUM_BLOCKS).astype(np.int32)
                plan = Plan(origin[:50], to[:50], prefill.checksum(origin[:50]))
                target.view[:] = 0
                await peer.read(plan, 10).done()
                assert (target.view[to[:50]] == prefill.pool.view[origin[:50]]).all()
                assert not target.view[to[50:]].any()

    run(story())


def test_no_more_is_asked_for_than_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "BATCH_BYTES", LAYOUT.block_bytes)
    pace = Pace(monkeypatch)

    async def story() -> None:
        async with connected() as (peer, _, _):
            read = peer.read(EVERYTHING, 10)
            await in_thread(pace.half.wait)
            read.cancel()
            await settled(read)
            pace.go.set()
            await peer.read(blocks(1), 10).done()
            assert pace.num_sent <= stream.WINDOW + 1

    run(story())


def test_two_workers_read_each_other_at_once() -> None:
    async def story() -> None:
        async with worker("prefill-0") as (one, first), worker("prefill-1") as (two, second):
            first.view[:32], second.view[32:] = 1, 2
            to_two, to_one = await one.connect(two.describe()), await two.connect(one.describe())
            high, low = blocks(*range(32, 64)), blocks(*range(32))
            await asyncio.gather(*(read.done() for read in (to_two.read(high, 10), to_one.read(low, 10))))
            assert (first.view == second.view).all() and (first.view[32:] == 2).all()

    run(story())


# --- addresses -----------------------------------------------------------------------------------------------------


def test_it_listens_where_it_is_told_and_says_so() -> None:
    async def story() -> None:
        async with worker("prefill-0") as (prefill, _), worker("decode-0") as (decode, pool):
            host, port = prefill._at
            assert host == "127.0.0.1" and port > 0
            with pytest.raises(ConfigError, match="cannot listen for KV readers"):
                TcpTransport("prefill-1", 1, "secret", f"127.0.0.1:{port}").register(pool)
            with pytest.raises(ConfigError, match="already"):
                decode.register(pool)
            elsewhere = TcpTransport("prefill-2", 1, "secret", "127.0.0.1:0", advertise="localhost")
            elsewhere.register(pool)
            assert elsewhere._at[0] == "localhost" and elsewhere._at[1] > 0
            peer = await decode.connect(elsewhere.describe())  # a name; it may have more than one address
            await peer.read(blocks(0), 10).done()
            await elsewhere.close()

    run(story())


def test_a_silent_listener_meets_the_time_limit() -> None:
    async def story() -> None:
        async with worker("prefill-0") as (prefill, pool), worker() as (decode, _):
            with socket.create_server(("127.0.0.1", 0)) as silent:
                advertise = f"127.0.0.1:{silent.getsockname()[1]}"
                elsewhere = TcpTransport("prefill-1", 1, "secret", "127.0.0.1:0", advertise)
                elsewhere.register(pool)
                with pytest.raises(PeerLost, match="did not answer within 0.05 s"):
                    await decode.connect(elsewhere.describe(), timeout_s=0.05)
                await elsewhere.close()

    run(story())


def test_one_may_read_without_being_read() -> None:
    async def story() -> None:
        async with worker("prefill-0") as (prefill, source):
            source.view[:] = 9
            reader, pool = TcpTransport("decode-0", 1, "secret"), Pool(LAYOUT, 4)
            reader.register(pool)
            with pytest.raises(ConfigError, match="does not listen"):
                reader.describe()
            peer = await reader.connect(prefill.describe())
            await peer.read(blocks(2), 10).done()
            assert (pool.view[2] == 9).all()
            await reader.close()
            pool.close()

    run(story())


def test_addresses() -> None:
    assert split_address("10.0.0.1:70") == ("10.0.0.1", 70)
    assert split_address("[::1]:0") == ("::1", 0)
    assert split_address("node-3", port=0) == ("node-3", 0)
    assert split_address("[fe80::1]", port=0) == ("fe80::1", 0)
    for wrong in ("node-3", ":70", "a:", "a:x", "a:65536", "a:-1", ""):
        with pytest.raises(ConfigError, match="not an address"):
            split_address(wrong)
    with pytest.raises(ConfigError, match="every interface"):
        TcpTransport("d", 1, "secret", "0.0.0.0:0")
    TcpTransport("d", 1, "secret", "0.0.0.0:0", advertise="node-3")
    with pytest.raises(ConfigError, match="cluster's key"):
        TcpTransport("d", 1, "", "127.0.0.1:0")


def test_uvloop_will_do() -> None:
    uvloop = pytest.importorskip("uvloop")

    async def story() -> None:
        async with connected() as (peer, target, prefill):
            await peer.read(EVERYTHING, 10).done()
            assert (target.view == prefill.pool.view).all()
            await prefill.close()
            assert "clos" in await reason(peer)

    uvloop.run(story())
