"""A worker's process: a socket to the router, its peers, a compute thread, a transport, and the driver.

Started by a supervisor, or by `diptych worker` on another host (`join.py`). Told to stop, it drains; it ends with
status 0 only when the router has dismissed it. Not responsible for decisions (`policy/worker.py`), nor for what they
mean (`worker.py`), nor for connections to peers (`peers.py`).
"""

import asyncio
import gc
import logging
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from diptych.engine.executor import Sampling
from diptych.errors import ProtocolError, TransferError
from diptych.journal import Journal
from diptych.linkrates import LinkRates
from diptych.policy.membership import Dismiss, Drain, Drained, LinkMeasured
from diptych.policy.messages import (
    Cancel,
    Emit,
    Finish,
    PeerLost,
    Place,
    Pull,
    Purpose,
    Read,
    ReadFailed,
    Run,
    Settled,
    Tick,
)
from diptych.serve import process
from diptych.serve.account import Account
from diptych.serve.build import Parts, build, facts_of
from diptych.serve.channel import Channel, call, join_host, listen
from diptych.serve.clock import Clock
from diptych.serve.compute import ComputeThread
from diptych.serve.liveness import PULSE_S
from diptych.serve.peers import Peers
from diptych.serve.wire import Ask, Bye, Gone, Hello, Meet, Pulse, Ready, Refuse, Register, Report
from diptych.serve.worker import WorkerDriver
from diptych.serve.worker_ports import ToPeer
from diptych.transfer.emulated import EmulatedTransport
from diptych.transfer.reach import Transports
from diptych.transfer.seam import Plan, Transfer, Transport

log = logging.getLogger(__name__)

READ_DEADLINE_S = 10.0  # for one read, and as long again ...
READ_DEADLINE_BYTES = 256 << 20  # ... for every so many bytes that are to come over that link before and with it


class WorkerProcess:
    """Implements the driver's ports over real sockets, threads and memory. `on_event` hears in words how it goes."""

    def __init__(self, orders: process.Orders, parts: Parts, on_event: Callable[[str], None] = log.info):
        self._orders = orders
        self._parts = parts
        self._on_event = on_event
        self._loop = asyncio.get_running_loop()
        spec = parts.policy.spec
        self._name = spec.name
        folder = orders.cluster.journal
        self._journal = Journal(Path(folder), spec.name, orders.incarnation, spec) if folder else None
        self._driver = WorkerDriver(parts.policy, self, Clock(), self._journal, parts.card.vocab_size)
        self._compute = ComputeThread(parts.executor, spec.depth, self._ran, self._driver.name_of)
        self._transport = kv_transport(orders)
        self._hello = Hello("peer", self._name, orders.incarnation)
        self._peers = Peers(
            self._hello, orders.key, self._transport, self._card, self._told, lambda peer: self._on(PeerLost(peer)),
            lambda message: self._router.say(message),
        )  # fmt: skip
        self._reads: dict[int, Transfer] = {}
        self._cancelled: set[int] = set()
        self._coming: dict[str, int] = {}  # bytes that are being read from each peer
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._deadline: float | None = None  # what the timer is set to
        self._router: Channel
        self._address = ""
        self._asked_to_stop = False
        self._over: asyncio.Future[tuple[int, str]] = self._loop.create_future()

    async def main(self) -> int:
        """Join the cluster, and work until the router is gone or we are told to go. Returns the exit status.

        0: drained and dismissed. 1: the router is gone, or we left at once. 2: refused, and the reason was said.
        """
        self._transport.register(self._parts.pool, self._driver.permits.readable)
        server = await self._listen()
        self._router = await call(
            self._orders.router, self._orders.key, replace(self._hello, kind="worker"), self._meet_router
        )
        self._router.say(self._card())
        self._spawn(self._live())
        for number in (signal.SIGTERM, signal.SIGINT) if self._orders.join else (signal.SIGTERM,):
            self._loop.add_signal_handler(number, self._stop)
        gc.collect()
        gc.freeze()  # what is loaded stays: no collection should walk it again
        try:
            status, why = await self._over
            self._on_event(why)
            return status
        finally:
            self._router.say(Bye())
            self._router.flush()
            server.close()
            self._peers.close()
            self._compute.stop()
            await self._transport.close(1.0)
            if self._journal is not None:
                self._journal.close()

    async def _listen(self) -> asyncio.Server:
        """Where peers call us: over TCP where there are other hosts, at a port of the kernel's choice."""
        orders = self._orders
        if orders.host is None:
            self._address = f"unix:{orders.runtime}/{self._name}.{orders.incarnation}.sock"
            return await listen(self._address, orders.key, self._name, self._peers.be_called)
        where = join_host(orders.bind or orders.host, 0)
        server = await listen(f"tcp:{where}", orders.key, self._name, self._peers.be_called)
        self._address = f"tcp:{join_host(orders.host, server.sockets[0].getsockname()[1])}"
        return server

    def _card(self) -> Register:
        spec = self._parts.policy.spec
        cluster = self._orders.cluster
        return Register(
            worker=self._name,
            incarnation=self._orders.incarnation,
            pid=os.getpid(),
            role=str(spec.role),
            num_blocks=spec.num_blocks,
            block_size=spec.block_size,
            address=self._address,
            transport=self._transport.describe(),
            token_bytes=self._parts.pool.layout.token_bytes,
            facts=facts_of(cluster, next(w for w in cluster.workers if w.name == self._name)),
        )

    def _stop(self) -> None:
        """Told to stop: first finish what is here, as if an operator had drained us; told again: leave at once."""
        if self._asked_to_stop:
            stopping = self._orders.stopping.exists()
            self._end(1, "stopped" if stopping else "left at once; what it had goes on elsewhere")
            return
        self._asked_to_stop = True
        timeout_s = self._orders.cluster.drain_timeout_s
        if not self._orders.stopping.exists():  # a supervisor that stops everything does not wait for that
            self._on_event(f"draining for at most {timeout_s:g} s; once more, and it leaves at once")
        self._router.say(Drain(self._name, timeout_s))

    async def _live(self) -> None:
        """Let the router know that we get on."""
        while True:
            self._router.say(Pulse(self._driver.computing_s()))
            await asyncio.sleep(PULSE_S)

    def _end(self, status: int, why: str) -> None:
        if not self._over.done():
            self._over.set_result((status, why))

    # --- the router ----------------------------------------------------------------------------------------------

    def _meet_router(self, channel: Channel) -> None:
        channel.heard = self._heard_router
        channel.lost = lambda why: self._end(1, f"the router is gone: {why}")

    def _heard_router(self, message: Any, attachment: bytes) -> None:
        match message:
            case Place() | Cancel() | Drain():
                self._on(message, attachment)
            case Meet():
                self._spawn(self._meet(message))
            case Gone(worker=worker, incarnation=incarnation):
                self._peers.forget(worker, incarnation)
            case Ask(number=number):
                state = self._driver.state() | {"pid": os.getpid(), "incarnation": self._orders.incarnation}
                self._router.say(Report(number), msgspec.json.encode(state))
            case Dismiss():
                self._end(0, "drained: it has left the cluster")
            case Refuse(why=why):
                self._end(2, f"refused: {why}")
            case _:
                raise ProtocolError(f"a router does not say {type(message).__name__}")

    async def _meet(self, message: Meet) -> None:
        """Connect to every worker that is there already, both ways, then report ready."""
        await self._peers.meet(tuple((name, address) for name, address in message.peers if name != self._name))
        self._router.say(Ready(self._name))
        self._peers.be_up()
        self._orders.up.touch()
        self._on_event(f"joined the cluster as {self._name}: up")

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
        link = self._peers.get(peer)
        if link is not None:
            link.channel.say(message, attachment)
        else:
            self._loop.call_soon(self._on, PeerLost(peer))

    def report(self, message: Emit | Finish | Drained | LinkMeasured | Account, attachment: bytes) -> None:
        self._router.say(message, attachment)

    def lane(self, peer: str) -> str:
        link = self._peers.get(peer)
        return link.source.lane if link is not None else "gone"

    def checksum(self, blocks: NDArray[np.int32]) -> NDArray[np.uint64]:
        return self._transport.checksum(blocks)

    def pull(self, order: Pull, plan: Plan) -> None:
        link = self._peers.get(order.peer)
        if link is None:
            self._loop.call_soon(self._on, ReadFailed(order.pull, f"no connection to {order.peer}"))
            self._loop.call_soon(self._on, Settled(order.pull))
            return
        if order.purpose == Purpose.HANDOVER:  # what is kept for others is kept as it was computed
            plan = replace(plan, codec=self._orders.cluster.codec)
        num_bytes = len(order.source) * self._parts.pool.layout.block_bytes
        self._coming[order.peer] = ahead = self._coming.get(order.peer, 0) + num_bytes
        deadline_s = READ_DEADLINE_S * (1 + ahead / READ_DEADLINE_BYTES)
        self._reads[order.pull] = link.source.read(plan, deadline_s)
        self._spawn(self._finish_read(order, num_bytes))

    def cancel_pull(self, pull: int) -> None:
        if pull in self._reads:
            self._cancelled.add(pull)
            self._reads[pull].cancel()

    async def _finish_read(self, order: Pull, num_bytes: int) -> None:
        """See one read to its end: the driver hears Read, or ReadFailed and then Settled."""
        pull = order.pull
        transfer = self._reads[pull]
        try:
            stats = await transfer.done()
            self._driver.travelled(order.rid, order.peer, stats)
            self._on(Read(pull, stats.num_bytes, stats.elapsed_s))
        except TransferError as error:
            if pull not in self._cancelled:
                self._on(ReadFailed(pull, str(error)))
            await transfer.settled
            self._on(Settled(pull))
        finally:
            del self._reads[pull]
            self._coming[order.peer] -= num_bytes
            if not self._coming[order.peer]:
                del self._coming[order.peer]
            self._cancelled.discard(pull)

    # --- events in -----------------------------------------------------------------------------------------------

    def _on(self, event: Any, attachment: bytes = b"") -> None:
        self._driver.on(event, attachment)
        self._set_timer()

    def _told(self, peer: str, event: Any, attachment: bytes) -> None:
        self._driver.told(peer, event, attachment)
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


def kv_transport(orders: process.Orders) -> Transport:
    """What carries KV from and to this worker: shared memory on this host, TCP where there may be others.

    As fast as it goes, unless links were asked for.
    """
    links, name = orders.cluster.links, orders.name
    ways = _ways(orders)
    return EmulatedTransport(ways, lambda peer: links.of(peer, name)) if links != LinkRates() else ways


def _ways(orders: process.Orders) -> Transports:
    transport = orders.cluster.transport
    host = orders.host or ("127.0.0.1" if transport == "tcp" else None)
    return Transports(
        orders.name,
        orders.incarnation,
        f"{orders.runtime}/shm",
        orders.key,
        listen=join_host(orders.bind or host, 0) if host else None,
        advertise=host,
        force=transport,
    )


def prepare(orders: process.Orders) -> Parts:
    """Everything that takes long and needs no connection: pin to cores, load the model."""
    worker = next(w for w in orders.cluster.workers if w.name == orders.name)
    if worker.cores:
        os.sched_setaffinity(0, worker.cores)
    return build(orders.cluster, worker)


def main() -> None:
    """The process's entry."""
    parts: list[Parts] = []

    async def work(orders: process.Orders) -> int:
        return await WorkerProcess(orders, parts[0]).main()

    process.run(work, lambda orders: parts.append(prepare(orders)))


if __name__ == "__main__":
    main()
