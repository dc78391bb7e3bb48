"""Shared memory between real processes: death, stops and strangers. What all transports share is in the contract."""

import asyncio
import contextlib
import gc
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from diptych.errors import ConfigError, PeerLost, TransferError
from diptych.transfer import native
from diptych.transfer.layout import Layout
from diptych.transfer.pool import Pool
from diptych.transfer.seam import Plan
from diptych.transfer.shm import ShmTransport

LAYOUT = Layout.uniform(layers=2, kv_heads=2, head_dim=16, block_size=16, dtype="float32", model="m")
NUM_BLOCKS = 64

SOURCE = f"""
import asyncio, os, sys
from diptych.transfer.layout import Layout
from diptych.transfer.pool import Pool
from diptych.transfer.shm import ShmTransport

async def main(folder, incarnation, fork):
    layout = Layout.uniform(layers=2, kv_heads=2, head_dim=16, block_size=16, dtype="float32", model="m")
    pool = Pool(layout, {NUM_BLOCKS})
    pool.view[:] = incarnation
    transport = ShmTransport("prefill-0", incarnation, folder)
    transport.register(pool)
    print(transport.describe().hex(), flush=True)
    if fork:  # once the peer is connected: the child inherits the connection
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
        if (child := os.fork()) == 0:
            import time; time.sleep(60); os._exit(0)
        print(child, flush=True)
    await asyncio.sleep(60)

asyncio.run(main(sys.argv[1], int(sys.argv[2]), len(sys.argv) > 3))
"""


@pytest.fixture
def folder() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="kv") as path:
        yield f"{path}/run"


class Source:
    """A prefill worker in a process of its own. Every byte of its pool is its incarnation."""

    def __init__(self, folder: str, incarnation: int = 1, *extra: str):
        command = [sys.executable, "-c", SOURCE, folder, str(incarnation), *extra]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        self.description = bytes.fromhex(self.line())

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def say(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text + "\n")

    def kill(self) -> None:
        self.process.kill()

    def clean_up(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def start(folder: str) -> Iterator[Callable[..., Source]]:
    sources: list[Source] = []

    def start_one(*arguments: int | str) -> Source:
        sources.append(Source(folder, *arguments))  # type: ignore[arg-type]
        return sources[-1]

    yield start_one
    for source in sources:
        source.clean_up()


@contextlib.asynccontextmanager
async def worker(folder: str, name: str = "decode-0") -> AsyncIterator[tuple[ShmTransport, Pool]]:
    pool, transport = Pool(LAYOUT, NUM_BLOCKS), ShmTransport(name, 1, folder)
    transport.register(pool)
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


def one_block(block: int = 0) -> Plan:
    return Plan(np.array([block], np.int32), np.array([block], np.int32))


async def reason(peer_lost: asyncio.Future[str], within_s: float = 5.0) -> str:
    return await asyncio.wait_for(asyncio.shield(peer_lost), within_s)


# --- the source dies, stops, comes back -------------------------------------------------------------------------


def test_kill_9_is_noticed_and_new_reads_are_refused(start: Callable[..., Source], folder: str) -> None:
    async def story() -> None:
        async with worker(folder) as (transport, pool):
            source = start(1)
            peer = await transport.connect(source.description)
            await peer.read(one_block(), 10).done()
            assert (pool.view[0] == 1).all()
            source.kill()
            assert "died" in await reason(peer.lost, within_s=1.0)
            read = peer.read(one_block(1), 10)
            assert read.settled.done()
            with pytest.raises(PeerLost, match="prefill-0"):
                await read.done()
            with pytest.raises(PeerLost, match="cannot be reached"):
                await transport.connect(source.description)
            assert not pool.view[1].any()

    run(story())


def test_kill_9_during_a_read_fails_it_and_it_settles(
    start: Callable[..., Source], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, opened, real = threading.Event(), threading.Event(), native.copy_blocks

    def slow(*arguments: object) -> int:
        entered.set()
        assert opened.wait(20)
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(native, "copy_blocks", slow)

    async def story() -> None:
        async with worker(folder) as (transport, pool):
            source = start(1)
            peer = await transport.connect(source.description)
            reads = [peer.read(one_block(i), 20) for i in range(2)]
            await asyncio.get_running_loop().run_in_executor(None, entered.wait)
            source.kill()
            for read in reads:
                with pytest.raises(PeerLost):
                    await read.done()
            assert [read.settled.done() for read in reads] == [False, True]
            opened.set()
            await asyncio.wait([reads[0].settled], timeout=5)
            assert reads[0].settled.done() and not pool.view.any()

    run(story())


def test_a_copy_from_a_dead_process_finishes_without_a_crash(start: Callable[..., Source], folder: str) -> None:
    async def story() -> None:
        async with worker(folder) as (transport, pool):
            source = start(1)
            peer = await transport.connect(source.description)
            mapped = peer._prepare.args[0].view  # type: ignore[attr-defined]
            source.kill()
            await reason(peer.lost)
            native.copy_blocks(pool.view, mapped, np.arange(NUM_BLOCKS), np.arange(NUM_BLOCKS))
            assert (pool.view == 1).all()

    run(story())


def test_the_mapping_of_the_dead_is_dropped(start: Callable[..., Source], folder: str) -> None:
    async def story() -> None:
        async with worker(folder) as (transport, _):
            before = _maps()
            source = start(1)
            peer = await transport.connect(source.description)
            plan = Plan(np.arange(2), np.arange(2), np.zeros(2, np.uint64))
            failed = peer.read(plan, 10)
            await asyncio.wait([failed.settled], timeout=5)
            assert _maps() == before + 1
            source.kill()
            await reason(peer.lost)
            await asyncio.sleep(0.01)
            assert _maps() == before  # although the failed transfer, and its error, are still at hand
            with pytest.raises(TransferError, match="checksum"):
                await failed.done()

    def _maps() -> int:
        return Path("/proc/self/maps").read_text().count("memfd:diptych-kv")

    gc.collect()
    gc.disable()  # a mapping that only the collector frees is a mapping kept
    try:
        run(story())
    finally:
        gc.enable()


def test_death_is_noticed_even_where_a_child_keeps_the_socket(start: Callable[..., Source], folder: str) -> None:
    async def story() -> None:
        async with worker(folder) as (transport, _):
            source = start(1, "fork")
            peer = await transport.connect(source.description)
            source.say("connected")
            child = int(source.line())
            try:
                source.kill()
                assert f"process {source.process.pid} died" in await reason(peer.lost)
            finally:
                os.kill(child, signal.SIGKILL)

    run(story())


def test_a_stopped_source_can_still_be_read(start: Callable[..., Source], folder: str) -> None:
    """One-sided: that a source hangs is for beats to notice, and its memory is still what it offered."""

    async def story() -> None:
        async with worker(folder) as (transport, pool):
            source = start(1)
            peer = await transport.connect(source.description)
            source.process.send_signal(signal.SIGSTOP)
            try:
                await peer.read(one_block(3), 10).done()
                assert (pool.view[3] == 1).all() and not peer.lost.done()
                with pytest.raises(PeerLost, match="did not answer within 0.1 s"):
                    await transport.connect(source.description, timeout_s=0.1)
            finally:
                source.process.send_signal(signal.SIGCONT)

    run(story())


def test_the_next_incarnation_is_read_not_the_last(start: Callable[..., Source], folder: str) -> None:
    async def story() -> None:
        async with worker(folder) as (transport, pool):
            first = start(1)
            old = await transport.connect(first.description)
            first.kill()
            await reason(old.lost)
            new = await transport.connect(start(2).description)
            await new.read(one_block(), 10).done()
            assert (pool.view[0] == 2).all() and not new.lost.done()

    run(story())


# --- the folder, the socket, the loop ------------------------------------------------------------------------------


def test_the_folder_and_the_socket_are_ours_alone(folder: str) -> None:
    async def story() -> None:
        async with worker(folder) as (owner, _):
            assert owner._exporter is not None
            assert os.stat(folder).st_mode & 0o777 == 0o700
            assert os.stat(owner._exporter.path).st_mode & 0o777 == 0o600
            os.chmod(folder, 0o777)
            with pytest.raises(ConfigError, match="changed by other users"):
                ShmTransport("decode-1", 1, folder)

    run(story())


def test_a_folder_with_too_long_a_name_is_refused_in_words(folder: str) -> None:
    async def story() -> None:
        pool = Pool(LAYOUT, 1)
        transport = ShmTransport("decode-0", 1, f"{folder}/{'x' * 100}")
        with pytest.raises(ConfigError, match="shorter runtime directory"):
            transport.register(pool)
        await transport.close()
        pool.close()

    run(story())


def test_two_workers_of_one_name_do_not_collide(folder: str) -> None:
    async def story() -> None:
        async with worker(folder) as (one, _), worker(folder) as (two, _):
            assert one.describe() != two.describe()
            with pytest.raises(ConfigError, match="already"):
                one.register(one.pool)

    run(story())


def test_uvloop_will_do(folder: str) -> None:
    uvloop = pytest.importorskip("uvloop")

    async def story() -> None:
        async with worker(folder, "prefill-0") as (prefill, source), worker(folder) as (decode, target):
            source.view[:] = 9
            peer = await decode.connect(prefill.describe())
            await peer.read(one_block(), 10).done()
            assert (target.view[0] == 9).all()
            await prefill.close()
            assert "clos" in await reason(peer.lost)

    uvloop.run(story())
