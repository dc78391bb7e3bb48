"""What a permit is good for: a worker's driver and policy, asked by its KV server over TCP about each request."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.config import load_cluster
from diptych.engine.executor import Sampling
from diptych.engine.paced import oracle
from diptych.errors import TransferError
from diptych.policy.messages import PeerLost, Tick
from diptych.serve.build import build
from diptych.serve.local import LocalCluster
from diptych.serve.permits import Permits
from diptych.transfer.pool import Pool
from diptych.transfer.reading import ThreadedPeer
from diptych.transfer.seam import NO_PERMIT, PERMIT_BYTES, Codec, Plan
from diptych.transfer.tcp import TcpTransport

PROMPT = list(range(1, 150))
RID = 64  # the first attempt at the first request


@pytest.fixture
def cluster() -> Iterator[LocalCluster]:
    config = load_cluster(None, {"engine": "paced", "prefill": 1, "decode": 1, "kv_memory": "64KiB", "chunk": 32})
    made = LocalCluster([build(config, worker) for worker in config.workers])
    made.config = config  # type: ignore[attr-defined]
    yield made
    made.close()


class Offered:
    """What p0 offers for a request of which d0 has read a part, and the permit that d0 was given with it."""

    def __init__(self, cluster: LocalCluster, peer: ThreadedPeer, target: Pool, codec: Codec):
        self.cluster, self.peer, self.target, self.codec = cluster, peer, target, codec
        self.source, self.sink = cluster.workers["p0"], cluster.workers["d0"]
        self.answer = cluster.submit(PROMPT, 40, Sampling())
        while not self.sink.traffic.num_transfers:
            cluster.step()
        self.permit = self.sink._held[RID].permit
        self.blocks = sorted(self.source.policy.source._offers[RID].blocks)
        assert len(self.blocks) >= 2 and not self.answer.over

    async def read(self, permit: bytes, blocks: list[int]) -> None:
        """What a reader with that permit gets is what is in these blocks; raises TransferError."""
        self.target.view[:] = 0
        ids = np.array(blocks, np.int32)
        await self.peer.read(Plan(ids, ids, codec=self.codec, permit=permit), 10).done()
        if self.codec == "raw":
            assert (self.target.view[ids] == self.cluster.parts["p0"].pool.view[ids]).all()
        assert self.target.view[ids].any(axis=1).all()

    async def refused(self, permit: bytes, blocks: list[int]) -> None:
        """Nothing comes, and the connection goes on: its last request is answered as the first was."""
        with pytest.raises(TransferError, match="p0 .* refused: it does not offer these blocks") as refusal:
            await self.read(permit, blocks)
        assert refusal.type is TransferError and not self.target.view.any() and not self.peer.lost.done()


Story = Callable[[Offered], Awaitable[None]]


@pytest.fixture(params=["raw", "int8"])
def play(request: pytest.FixtureRequest, cluster: LocalCluster) -> Callable[[Story], None]:
    """Runs a story in which p0's pool is served over TCP, and read by somebody who has the cluster's key."""
    pool = cluster.parts["p0"].pool

    async def main(story: Story) -> None:
        target = Pool(pool.layout, pool.num_blocks)
        source, reader = (TcpTransport(name, 1, "the key", "127.0.0.1:0") for name in ("p0", "d0"))
        source.register(pool, cluster.workers["p0"].permits.readable)
        reader.register(target)
        async with asyncio.timeout(30):
            peer = await reader.connect(source.describe())
            try:
                await story(Offered(cluster, peer, target, request.param))
            finally:
                await asyncio.gather(reader.close(), source.close())
                target.close()

    return lambda story: asyncio.run(main(story))


def test_a_permit_is_good_for_what_was_published_and_for_nothing_else(play: Callable[[Story], None]) -> None:
    async def story(offered: Offered) -> None:
        await offered.read(offered.permit, offered.blocks)
        others = [b for b in range(offered.target.num_blocks) if b not in offered.blocks]
        promised = offered.source.policy.seqs[RID].blocks[len(offered.blocks) :]  # memory of it that is not written yet
        assert promised and set(promised) <= set(others)
        for beyond in (others[:1], promised, [*offered.blocks, others[-1]]):
            await offered.refused(offered.permit, beyond)
        await offered.read(offered.permit, offered.blocks[1:])

    play(story)


def test_what_was_not_given_is_refused(play: Callable[[Story], None]) -> None:
    """Forged; another attempt's, offered or not; that of the worker's next process; the peer's own."""

    async def story(offered: Offered) -> None:
        second = offered.cluster.submit(PROMPT[::-1], 40, Sampling())
        while not (other := offered.source.policy.source._offers.get(2 * RID)) or not other.blocks:
            offered.cluster.step()
        forged = [NO_PERMIT, offered.permit[:8] + bytes(PERMIT_BYTES - 8), bytes([65]) + offered.permit[1:]]
        attempts = [offered.source.permits.issue(rid) for rid in (RID + 1, 2 * RID, 0)]
        processes = [Permits(offered.source.policy).issue(RID), offered.sink.permits.issue(RID)]
        blocks = offered.blocks if RID in offered.source.policy.source else []
        assert blocks
        for permit in (*forged, *attempts, *processes):
            await offered.refused(permit, blocks)
        await offered.read(offered.permit, blocks)
        await offered.read(attempts[1], sorted(other.blocks))
        assert not second.over

    play(story)


def test_it_is_over_with_done(play: Callable[[Story], None]) -> None:
    async def story(offered: Offered) -> None:
        while RID in offered.source.policy.source:
            await offered.read(offered.permit, offered.blocks)
            offered.cluster.step()
        await offered.refused(offered.permit, offered.blocks)
        offered.cluster.run_until([offered.answer])
        assert offered.answer.tokens == oracle(PROMPT, 40, offered.cluster.config.paced)  # type: ignore[attr-defined]
        await offered.refused(offered.permit, offered.blocks)

    play(story)


def test_it_is_over_with_drop(play: Callable[[Story], None]) -> None:
    async def story(offered: Offered) -> None:
        offered.cluster.cancel(offered.answer)
        offered.cluster.settle()
        await offered.refused(offered.permit, offered.blocks)

    play(story)


def test_it_is_over_with_the_connection(play: Callable[[Story], None]) -> None:
    async def story(offered: Offered) -> None:
        offered.source.on(PeerLost("d0"))
        await offered.refused(offered.permit, offered.blocks)

    play(story)


def test_it_is_over_with_the_lease(play: Callable[[Story], None]) -> None:
    async def story(offered: Offered) -> None:
        while offered.source.policy.source.next_deadline() is None:  # until the prompt is computed
            offered.cluster.step()
        await offered.read(offered.permit, offered.blocks)
        now = offered.cluster.clock()
        offered.source._clock = lambda: now + 1000
        offered.source.on(Tick())
        await offered.refused(offered.permit, offered.blocks)

    play(story)


def test_the_other_way_it_is_good_for_the_copies_that_are_open(cluster: LocalCluster) -> None:
    """A decode worker lets its keeper read blocks of the answer, until that has them."""
    keeper, writer = cluster.workers["p0"], cluster.workers["d0"]
    plans: list[Plan] = []
    pull = keeper._ports.pull

    def note(order: Any, plan: Plan) -> None:
        plans.append(plan)
        pull(order, plan)

    keeper._ports.pull = note  # type: ignore[method-assign]
    answer = cluster.submit(PROMPT, 60, Sampling())
    while not plans:
        cluster.step()
    (plan,) = plans
    blocks = plan.source.tolist()
    rest = [b for b in writer.policy.seqs[RID].blocks if b not in blocks]
    ask = writer.permits.readable
    assert ask(plan.permit, blocks) and not ask(plan.permit, rest) and not ask(plan.permit, [*blocks, rest[0]])
    assert not ask(keeper.permits.issue(RID), blocks) and not ask(writer.permits.issue(RID + 1), blocks)
    while any(batch.blocks[0] == blocks[0] for batch in writer.policy.copies._open.get(RID, ())):
        cluster.step()
    assert not answer.over and not ask(plan.permit, blocks)
    cluster.run_until([answer])
    cluster.settle()
    assert keeper.traffic.num_failed == 0 and len(plans) >= 3


@given(at=st.integers(0, PERMIT_BYTES - 1), change=st.integers(1, 255), rid=st.integers(0, (1 << 63) - 1))
def test_every_byte_counts(at: int, change: int, rid: int) -> None:
    class Everything:
        """Offers all."""

        def covers(self, rid: int, blocks: list[int]) -> bool:
            return True

    class Open:
        source = copies = Everything()

    permits = Permits(Open())  # type: ignore[arg-type]
    altered = bytearray(permits.issue(rid))
    assert len(altered) == PERMIT_BYTES and permits.readable(bytes(altered), [1])
    altered[at] ^= change
    assert not permits.readable(bytes(altered), [1])
    assert not permits.readable(permits.issue(rid)[:-1], [1])


def test_a_read_without_it_fails_and_the_answer_is_the_same(cluster: LocalCluster) -> None:
    """In one process, too, every read shows its permit: so all token tests go by valid ones."""
    sink = cluster.workers["d0"]
    pull = sink._ports.pull
    sink._ports.pull = lambda order, plan: pull(order, replace(plan, permit=NO_PERMIT))  # type: ignore[method-assign]
    answer = cluster.submit(PROMPT, 20, Sampling())
    cluster.run_until([answer])
    assert sink.traffic.num_failed == 1 and sink.traffic.num_transfers == 0
    assert answer.tokens == oracle(PROMPT, 20, cluster.config.paced)  # type: ignore[attr-defined]
