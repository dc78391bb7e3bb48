"""Workers that meet over real sockets: at the same moment, after a break, and when one is gone for good."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diptych.policy.membership import LinkDown, LinkUp
from diptych.policy.messages import Beat
from diptych.serve import peers as module
from diptych.serve.channel import listen
from diptych.serve.peers import Peers
from diptych.serve.wire import Hello, Register
from diptych.transfer.layout import Layout
from diptych.transfer.pool import Pool
from diptych.transfer.shm import ShmTransport

KEY = "a key of the test"
LAYOUT = Layout.uniform(layers=1, kv_heads=1, head_dim=8, block_size=4, dtype="float32", model="m")


class Worker:
    """A worker without a policy: what it hears of its peers, and what it tells the router."""

    def __init__(self, name: str, folder: Path, incarnation: int = 0):
        self.name = name
        self.address = f"unix:{folder}/{name}.{incarnation}.sock"
        self.heard: list[Any] = []
        self.lost: list[str] = []
        self.reports: list[LinkDown | LinkUp] = []
        self.pool = Pool(LAYOUT, 4)
        self.transport = ShmTransport(name, incarnation, folder / "shm")
        self.transport.register(self.pool)
        card = Register(name, incarnation, 1, "mixed", 4, 4, self.address, self.transport.describe())
        self.peers = Peers(
            Hello("peer", name, incarnation), KEY, self.transport, lambda: card,
            lambda peer, message, attachment: self.heard.append(message), self.lost.append, self.reports.append,
        )  # fmt: skip

    async def open(self) -> None:
        self.server = await listen(self.address, KEY, self.name, self.peers.be_called)

    async def join(self, *others: "Worker") -> None:
        await self.peers.meet(tuple((other.name, other.address) for other in others))
        self.peers.be_up()

    async def close(self) -> None:
        self.server.close()
        self.peers.close()
        await self.transport.close(0.0)

    def sees(self, other: "Worker") -> bool:
        return self.peers.get(other.name) is not None


@contextlib.asynccontextmanager
async def workers(folder: Path, names: str) -> AsyncIterator[list[Worker]]:
    made = [Worker(name, folder) for name in names]
    for worker in made:
        await worker.open()
    try:
        yield made
    finally:
        for worker in made:
            await worker.close()
        await asyncio.sleep(0)
        for worker in made:
            worker.pool.close()


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not true():
            await asyncio.sleep(0.005)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_WAIT_S", 0.01)


def test_workers_that_join_at_the_same_moment_are_all_connected(tmp_path: Path) -> None:
    """Each calls those that registered before it, whether they are ready or not."""

    async def run() -> None:
        async with workers(tmp_path, "abcdef") as made:
            await asyncio.gather(*(worker.join(*made[:i]) for i, worker in enumerate(made)))
            await until(lambda: all(one.sees(other) for one in made for other in made if one is not other))
            assert not any(worker.lost for worker in made)
            made[5].peers.get("a").channel.say(Beat("f", (1,)))  # type: ignore[union-attr]
            await until(lambda: made[0].heard == [Beat("f", (1,))])

    asyncio.run(run())


@pytest.mark.parametrize("breaker", [0, 1])
def test_a_connection_that_breaks_is_made_again(tmp_path: Path, breaker: int) -> None:
    async def run() -> None:
        async with workers(tmp_path, "ab") as (old, new):
            await old.join()
            await new.join(old)
            link = (old, new)[breaker].peers.get("ba"[breaker])
            assert link is not None
            link.channel.close("cut by the test")
            await until(lambda: bool(old.lost and new.lost))
            await until(lambda: old.sees(new) and new.sees(old))
            assert old.lost == ["b"] and new.lost == ["a"], "once for each break"
            assert old.reports == [LinkDown("a", "b"), LinkUp("a", "b")]
            assert new.reports == [LinkDown("b", "a"), LinkUp("b", "a")]
            target = new.peers.get("a")
            assert target is not None and isinstance(target.source.layout, Layout)

    asyncio.run(run())


def test_who_cannot_be_reached_at_first_is_called_until_it_can(tmp_path: Path) -> None:
    async def run() -> None:
        async with workers(tmp_path, "b") as (new,):
            old = Worker("a", tmp_path)
            await new.join(old)
            assert new.reports == [LinkDown("b", "a")] and not new.sees(old)
            await old.open()
            await old.join()
            await until(lambda: new.sees(old) and old.sees(new))
            assert new.reports == [LinkDown("b", "a"), LinkUp("b", "a")] and not new.lost
            await old.close()
            old.pool.close()

    asyncio.run(run())


def test_who_is_gone_for_good_is_called_no_more_and_its_successor_is_welcome(tmp_path: Path) -> None:
    async def run() -> None:
        async with workers(tmp_path, "b") as (new,):
            old = Worker("a", tmp_path)
            await old.open()
            await old.join()
            await new.join(old)
            await old.close()
            await until(lambda: new.lost == ["a"])
            new.peers.forget("a", 0)
            await until(lambda: not new.peers._tasks)
            again = Worker("a", tmp_path, incarnation=1)
            await again.open()
            await again.join(new)
            await until(lambda: new.sees(again))
            assert new.reports == [LinkDown("b", "a"), LinkUp("b", "a")]
            await again.close()
            old.pool.close()
            again.pool.close()

    asyncio.run(run())


def test_who_hangs_is_hung_up_on(tmp_path: Path) -> None:
    """Its connection still stands: the router's word ends it, and with it every wait; a late word about who was there
    before does not concern its successor."""

    async def run() -> None:
        async with workers(tmp_path, "ab") as (old, new):
            await old.join()
            await new.join(old)
            new.peers.forget("a", -1)
            assert new.sees(old) and not new.lost
            new.peers.forget("a", 0)
            assert not new.sees(old) and new.lost == ["a"] and new.reports == [LinkDown("b", "a")]
            await until(lambda: old.lost == ["b"] and not new.peers._tasks)

    asyncio.run(run())


def test_blocks_can_be_read_over_a_connection_made_again(tmp_path: Path) -> None:
    from diptych.transfer.seam import Plan

    async def run() -> None:
        async with workers(tmp_path, "ab") as (old, new):
            await old.join()
            await new.join(old)
            new.peers.get("a").channel.close("cut by the test")  # type: ignore[union-attr]
            await until(lambda: bool(new.reports) and new.reports[-1] == LinkUp("b", "a"))
            blocks = np.array([0, 1], np.int32)
            plan = Plan(blocks, blocks, old.transport.checksum(blocks))
            stats = await new.peers.get("a").source.read(plan, 5.0).done()  # type: ignore[union-attr]
            assert stats.num_bytes == 2 * LAYOUT.block_bytes

    asyncio.run(run())
