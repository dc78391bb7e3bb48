"""A worker's process: sockets to the router and to every peer, a compute thread, a transport, and the driver.

Not responsible for decisions (`policy/worker.py`) nor for what they mean (`worker.py`).
"""

import asyncio
import gc
import logging
import os
import time
from functools import partial
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np
from numpy.typing import NDArray

from diptych.engine.executor import Sampling
from diptych.errors import ProtocolError, TransferError
from diptych.journal import Journal
from diptych.policy.messages import (
    Cancel,
    Emit,
    Finish,
    PeerLost,
    Place,
    Pull,
    Read,
    ReadFailed,
    Run,
    Settled,
    Tick,
)
from diptych.serve import process
from diptych.serve.build import Parts, build
from diptych.serve.channel import Channel, call, listen
from diptych.serve.clock import Clock
from diptych.serve.compute import ComputeThread
from diptych.serve.wire import Ask, Bye, Hello, Meet, Ready, Register, Report
from diptych.serve.worker import ToPeer, WorkerDriver
from diptych.transfer.seam import Peer, Plan, Transfer
from diptych.transfer.shm import ShmTransport

log = logging.getLogger(__name__)

READ_DEADLINE_S = 10.0
JOIN_S = 5.0  # how long a peer may take to answer, and then to be ready
_FROM_PEERS = get_args(ToPeer)


class Link:
    """One peer: its control channel, and its blocks."""

    def __init__(self, name: str, channel: Channel, source: Peer):
        self.name = name
        self.channel = channel
        self.source = source


class WorkerProcess:
    """Implements the driver's ports over real sockets, threads and memory."""

    def __init__(self, orders: process.Orders, parts: Parts):
        self._orders = orders
        self._parts = parts
        self._loop = asyncio.get_running_loop()
        spec = parts.policy.spec
        self._name = spec.name
        folder = orders.cluster.journal
        self._journal = Journal(Path(folder), spec.name, orders.incarnation, spec) if folder else None
        self._driver = WorkerDriver(parts.policy, self, Clock(), self._journal)
        self._compute = ComputeThread(parts.executor, spec.depth, self._ran)
        self._transport = ShmTransport(spec.name, orders.incarnation, f"{orders.runtime}/shm")
        self._links: dict[str, Link] = {}
        self._reads: dict[int, Transfer] = {}
        self._cancelled: set[int] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._deadline: float | None = None  # what the timer is set to
        self._router: Channel
        self._over: asyncio.Future[str] = self._loop.create_future()

    async def main(self) -> None:
        """Join the cluster, and work until the router is gone or we are told to stop."""
        self._transport.register(self._parts.pool)
        server = await listen(self._address, self._orders.key, self._name, self._called)
        hello = Hello("worker", self._name, self._orders.incarnation, self._orders.key)
        self._router = await call(self._orders.router, hello, self._meet_router)
        self._router.say(self._card())
        gc.collect()
        gc.freeze()  # what is loaded stays: no collection should walk it again
        try:
            log.info("ends: %s", await self._over)
        finally:
            self._router.say(Bye())
            self._router.flush()
            server.close()
            self._compute.stop()
            await self._transport.close(1.0)
            if self._journal is not None:
                self._journal.close()

    @property
    def _address(self) -> str:
        return f"unix:{self._orders.runtime}/{self._name}.{self._orders.incarnation}.sock"

    def _card(self) -> Register:
        spec = self._parts.policy.spec
        return Register(
            worker=self._name,
            incarnation=self._orders.incarnation,
            pid=os.getpid(),
            role=str(spec.role),
            num_blocks=spec.num_blocks,
            block_size=spec.block_size,
            address=self._address,
            transport=self._transport.describe(),
        )

    # --- the router ----------------------------------------------------------------------------------------------

    def _meet_router(self, channel: Channel) -> None:
        channel.heard = self._heard_router
        channel.lost = lambda why: None if self._over.done() else self._over.set_result(f"the router is gone: {why}")

    def _heard_router(self, message: Any, attachment: memoryview) -> None:
        match message:
            case Place() | Cancel():
                self._on(message, attachment)
            case Meet():
                self._spawn(self._meet(message))
            case Ask(number=number):
                state = self._driver.state() | {"pid": os.getpid(), "incarnation": self._orders.incarnation}
                self._router.say(Report(number), msgspec.json.encode(state))
            case _:
                raise ProtocolError(f"a router does not say {type(message).__name__}")

    async def _meet(self, message: Meet) -> None:
        """Connect to every worker that is there already, both ways, then report ready."""
        await asyncio.gather(*(self._call_peer(address) for name, address in message.peers if name != self._name))
        self._router.say(Ready(self._name))

    # --- peers ---------------------------------------------------------------------------------------------------

    async def _call_peer(self, address: str) -> None:
        ready: asyncio.Future[None] = self._loop.create_future()
        hello = Hello("peer", self._name, self._orders.incarnation, self._orders.key)
        try:
            channel = await call(address, hello, partial(self._meet_peer, ready=ready), JOIN_S)
            channel.say(self._card())
            await asyncio.wait_for(ready, JOIN_S)
        except (TransferError, TimeoutError) as error:  # a peer that is dead or hangs is no reason not to work
            log.warning("peer at %s: %s", address, error or "it did not get ready in time")

    def _called(self, channel: Channel, hello: Hello) -> None:
        self._meet_peer(channel)
        channel.say(self._card())

    def _meet_peer(self, channel: Channel, ready: asyncio.Future[None] | None = None) -> None:
        """Both sides send their card, connect to the other's blocks and then say Ready; `ready` is set on both."""
        state = {"linked": False, "ready": False}

        def step(key: str) -> None:
            state[key] = True
            if all(state.values()) and ready is not None and not ready.done():
                ready.set_result(None)

        async def link(card: Register) -> None:
            try:
                source = await self._transport.connect(card.transport)
            except TransferError as error:
                log.error("cannot read the blocks of %s: %s", card.worker, error)
                channel.close(str(error))
                return
            self._link(Link(card.worker, channel, source))
            channel.say(Ready(self._name))
            step("linked")

        def heard(message: Any, attachment: memoryview) -> None:
            match message:
                case Register():
                    self._spawn(link(message))
                case Ready():
                    step("ready")
                case _ if isinstance(message, _FROM_PEERS):
                    self._on(message, attachment)
                case _:
                    raise ProtocolError(f"a peer does not say {type(message).__name__}")

        def lost(why: str) -> None:
            self._unlink(channel, why)
            if ready is not None and not ready.done():
                ready.set_result(None)  # a peer that died while we met it is no reason not to work

        channel.heard, channel.lost = heard, lost

    def _link(self, link: Link) -> None:
        if link.name in self._links:
            self._unlink(self._links[link.name].channel, "it called again")
        self._links[link.name] = link
        link.source.lost.add_done_callback(lambda reason: self._unlink(link.channel, reason.result()))

    def _unlink(self, channel: Channel, why: str) -> None:
        """A peer is gone; say so once, and let go of its memory."""
        link = next((link for link in self._links.values() if link.channel is channel), None)
        if link is None:
            return
        del self._links[link.name]
        channel.close()
        self._spawn(link.source.close())
        self._on(PeerLost(link.name))

    # --- the driver's ports --------------------------------------------------------------------------------------

    def admit(self, rid: int, tokens: list[int], num_prompt: int, sampling: Sampling) -> None:
        self._compute.call(lambda: self._parts.executor.admit(rid, tokens, num_prompt, sampling))

    def extend(self, rid: int, tokens: list[int]) -> None:
        self._compute.call(lambda: self._parts.executor.extend(rid, tokens))

    def forget(self, rid: int) -> None:
        self._compute.call(lambda: self._parts.executor.forget(rid))

    def run(self, step: Run) -> None:
        self._compute.run(step)

    def tell(self, peer: str, message: ToPeer, attachment: bytes) -> None:
        link = self._links.get(peer)
        if link is not None:
            link.channel.say(message, attachment)
        else:
            self._loop.call_soon(self._on, PeerLost(peer))

    def report(self, message: Emit | Finish, attachment: bytes) -> None:
        self._router.say(message, attachment)

    def checksum(self, blocks: NDArray[np.int32]) -> NDArray[np.uint64]:
        return self._transport.checksum(blocks)

    def pull(self, order: Pull, plan: Plan) -> None:
        link = self._links.get(order.peer)
        if link is None:
            self._loop.call_soon(self._on, ReadFailed(order.pull, f"no connection to {order.peer}"))
            self._loop.call_soon(self._on, Settled(order.pull))
            return
        self._reads[order.pull] = link.source.read(plan, READ_DEADLINE_S)
        self._spawn(self._finish_read(order.pull))

    def cancel_pull(self, pull: int) -> None:
        if pull in self._reads:
            self._cancelled.add(pull)
            self._reads[pull].cancel()

    async def _finish_read(self, pull: int) -> None:
        """See one read to its end: the driver hears Read, or ReadFailed and then Settled."""
        transfer = self._reads[pull]
        try:
            stats = await transfer.done()
            self._on(Read(pull, stats.num_bytes, stats.elapsed_s))
        except TransferError as error:
            if pull not in self._cancelled:
                log.warning("read %d failed: %s", pull, error)
                self._on(ReadFailed(pull, str(error)))
            await transfer.settled
            self._on(Settled(pull))
        finally:
            del self._reads[pull]
            self._cancelled.discard(pull)

    # --- events in -----------------------------------------------------------------------------------------------

    def _on(self, event: Any, attachment: bytes | memoryview = b"") -> None:
        self._driver.on(event, attachment)
        self._set_timer()

    def _ran(self, step: int, result: Any) -> None:
        self._driver.ran(step, result)
        self._set_timer()

    def _set_timer(self) -> None:
        deadline = self._parts.policy.next_deadline()
        if deadline == self._deadline:
            return
        self._deadline = deadline
        if self._timer is not None:
            self._timer.cancel()
        if deadline is None:
            self._timer = None
        else:
            self._timer = self._loop.call_later(max(deadline - time.monotonic(), 0.0) + 1e-3, self._tick)

    def _tick(self) -> None:
        self._timer = self._deadline = None
        self._on(Tick())

    def _spawn(self, work: Any) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def main() -> None:
    """The process's entry."""
    parts: list[Parts] = []

    def prepare(orders: process.Orders) -> None:
        worker = next(w for w in orders.cluster.workers if w.name == orders.name)
        if worker.cores:
            os.sched_setaffinity(0, worker.cores)
        parts.append(build(orders.cluster, worker))

    async def work(orders: process.Orders) -> None:
        await WorkerProcess(orders, parts[0]).main()

    process.run(work, prepare)


if __name__ == "__main__":
    main()
