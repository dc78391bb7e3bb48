"""The router's process: sockets to every worker and API process, and the driver.

Introduces workers to each other: a new one is told who is there, connects to all of them, and only then is given work.
One that does not fit is refused, one that is done is dismissed.
Not responsible for decisions (`policy/router.py`) nor for what they mean (`router.py`).
"""

import asyncio
import itertools
import logging
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from diptych.errors import ProtocolError
from diptych.journal import Journal
from diptych.policy.membership import Dismiss, Drain, Drained, LinkDown, LinkMeasured, LinkUp
from diptych.policy.messages import Cancel, Cancelled, Emit, Finish, Place, Role, Submitted, Tick, WorkerUp
from diptych.policy.router import Router
from diptych.serve import health, process
from diptych.serve.account import Prefilled, Received, Stalled
from diptych.serve.build import cluster_card, differences, facts_of
from diptych.serve.channel import Channel, listen
from diptych.serve.clock import Clock
from diptych.serve.frontend import Label
from diptych.serve.joined import Client, Joined, fits
from diptych.serve.liveness import PULSE_S, Liveness, end
from diptych.serve.router import RouterDriver
from diptych.serve.wire import (
    Ask,
    Bye,
    Deliver,
    Gone,
    Hello,
    Look,
    Meet,
    Note,
    Pulse,
    Ready,
    Refuse,
    Register,
    Report,
    Retire,
    Submit,
    Terms,
    check_ids,
    state_of,
    unpack_ids,
    unpack_ticket,
)  # fmt: skip

log = logging.getLogger(__name__)

REPORT_S = 1.0  # how long a worker may take to say how it is


class RouterProcess:
    """Implements the driver's ports over real sockets."""

    def __init__(self, orders: process.Orders):
        self._orders = orders
        cluster = orders.cluster
        self._journal = (
            Journal(Path(cluster.journal), "router", orders.incarnation, cluster.router) if cluster.journal else None
        )
        self._clock = Clock()
        self._card = cluster_card(cluster)
        self._driver = RouterDriver(Router(cluster.router), self, self._clock, self._journal, self._card.vocab_size)
        self._driver.records.telemetry.alias(self._card.name)
        self._facts = facts_of(cluster, (*cluster.workers, cluster.guest)[0])
        self._workers: dict[str, Joined] = {}
        self._liveness: Liveness[Channel] = Liveness(cluster.stuck_s)
        self._reports: dict[tuple[str, int], Callable[[bytes], None]] = {}
        self._numbers = itertools.count(1)
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def main(self) -> None:
        """Serve until told to stop."""
        orders = self._orders
        servers = []
        if orders.fd is not None:
            far = socket.socket(fileno=orders.fd)
            servers.append(await listen(far, orders.key, "router", self._called_from_afar))
        servers.append(await listen(orders.router, orders.key, "router", self._called))
        self._spawn(process.show_life(orders))
        try:
            await self._watch()
        finally:
            for server in servers:
                server.close()
            if self._journal is not None:
                self._journal.close()

    def _called(self, channel: Channel, hello: Hello) -> None:
        if hello.kind == "api":
            self._client_called(channel)
        else:
            self._called_from_afar(channel, hello)

    def _called_from_afar(self, channel: Channel, hello: Hello) -> None:
        if hello.kind == "worker":
            self._worker_called(channel)
        elif hello.kind == "join":
            self._guest_called(channel)
        else:
            raise ProtocolError(f"a router has nothing to say to a {hello.kind!r} over this connection")

    def _guest_called(self, channel: Channel) -> None:
        """Somebody would join: say what is served here, so that it can get ready. Secrets stay here."""
        if channel.name in self._workers:
            channel.say(Refuse(f"a worker {channel.name} is here already; give another --name"))
            return
        terms = msgspec.structs.replace(
            self._orders.cluster, workers=(), api_key=None, cluster_key=None, journal=None, listen=None, address=None
        )
        channel.say(Terms(self._facts), msgspec.json.encode(terms))

    # --- workers -------------------------------------------------------------------------------------------------

    def _worker_called(self, channel: Channel) -> None:
        def heard(message: Any, attachment: bytes) -> None:
            self._liveness.heard(channel)
            match message:
                case Emit() | Finish():
                    self._driver.heard(channel.name, message, attachment)
                case Prefilled() | Received() | Stalled():
                    self._driver.records.accounted(channel.name, message)
                case Report(number=number):
                    answered = self._reports.pop((channel.name, number), None)
                    if answered is not None:
                        answered(attachment)
                case Register():
                    self._register(channel, message)
                case Ready():
                    self._ready(channel)
                case LinkDown() | LinkUp() | LinkMeasured() | Drain() | Drained():
                    self._told(channel, replace(message, worker=channel.name))
                case Pulse(computing_s=computing_s):
                    self._liveness.heard(channel, computing_s)
                case Bye():
                    self._worker_lost(channel, "it was told to stop", logging.INFO)
                case _:
                    raise ProtocolError(f"a worker does not say {type(message).__name__}")

        def lost(why: str) -> None:
            self._liveness.forget(channel)
            self._worker_lost(channel, why)

        channel.heard, channel.lost = heard, lost

    async def _watch(self) -> None:
        """Give up workers that hang: nothing waits for them any more, and of this host they end."""
        while True:
            await asyncio.sleep(PULSE_S)
            for channel, why in self._liveness.look(time.monotonic()):
                self._worker_lost(channel, f"it is stuck: {why}")
                if pid := channel.pid:
                    end(pid)
                channel.drop(why)

    def _told(self, channel: Channel, event: LinkDown | LinkUp | LinkMeasured | Drain | Drained) -> None:
        """A worker says whom it can reach, or that it wants to leave."""
        joined = self._workers.get(channel.name)
        if joined is None or joined.channel is not channel:
            return
        if isinstance(event, LinkDown | LinkUp) and event.peer not in self._workers:
            return  # nobody is placed with it, and it says itself whom it can reach when it comes
        if joined.up:
            self._tell(event)
        elif isinstance(event, Drain):
            self.dismiss(channel.name)

    def _tell(self, event: LinkDown | LinkUp | LinkMeasured | Drain | Drained | Tick) -> None:
        """Let policy know, and wake it when it wants to be."""
        self._driver.told(event)
        deadline = self._driver.policy.next_deadline()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if deadline is not None:
            wait_s = max(deadline - time.monotonic(), 0.0) + 1e-3
            self._timer = asyncio.get_running_loop().call_later(wait_s, self._tell, Tick())

    def _register(self, channel: Channel, card: Register) -> None:
        why = self._objection(channel, card)
        known = self._workers.get(channel.name)
        if known is not None and known.card.incarnation >= card.incarnation:
            why = f"a worker {channel.name} is here already; give another --name"
        if why:
            log.warning("worker %s is refused: %s", channel.name, why)
            channel.say(Refuse(why))
            channel.close(why)
            return
        if known is not None:
            self._worker_lost(known.channel, "a new incarnation has come")
            known.channel.close("a new incarnation has come")
        peers = tuple((joined.card.worker, joined.card.address) for joined in self._workers.values())
        self._workers[channel.name] = Joined(channel, card)
        channel.say(Meet(peers))

    def _objection(self, channel: Channel, card: Register) -> str:
        """Why a worker cannot be part of this cluster, or ""."""
        sizes = card.block_size == self._card.block_size and 1 <= card.num_blocks < 1 << 31
        if card.worker != channel.name or card.role not in list(Role) or not sizes:
            return "its card makes no sense"
        return differences(self._facts, card.facts)

    def _ready(self, channel: Channel) -> None:
        joined = self._workers.get(channel.name)
        if joined is None or joined.channel is not channel or joined.up:
            raise ProtocolError("Ready without Register")
        joined.up = True
        card = joined.card
        self._driver.worker_up(
            WorkerUp(card.worker, card.incarnation, Role(card.role), card.num_blocks, card.block_size, card.token_bytes)
        )

    def _worker_lost(self, channel: Channel, why: str, level: int = logging.WARNING) -> None:
        joined = self._workers.get(channel.name)
        if joined is None or joined.channel is not channel:
            return
        log.log(level, "worker %s is lost: %s", channel.name, why)
        del self._workers[channel.name]
        for other in self._workers.values():
            other.channel.say(Gone(channel.name, joined.card.incarnation))
        if joined.up:
            self._driver.worker_lost(channel.name)

    def _retire(self, request: Retire) -> dict[str, Any]:
        """An operator takes a worker out of service: an HTTP status, and what there is to say."""
        joined, policy = self._workers.get(request.worker), self._driver.policy
        if joined is None:
            return {"status": 404, "why": f"there is no worker {request.worker!r}; /workers lists them"}
        if not joined.up:
            self.dismiss(request.worker)
            return {"status": 202, "id": request.worker, "state": "dismissed before it was up"}
        if not request.force and request.worker not in policy.drains and policy.needs(request.worker):
            why = f"{request.worker} is the last {joined.card.role} worker that takes requests; to drain it nonetheless"
            return {"status": 409, "why": f'{why}, say {{"force": true}}'}
        self._tell(Drain(request.worker, request.timeout_s))
        return {"status": 202, "id": request.worker, "state": "draining", "timeout_s": request.timeout_s}

    # --- API processes -------------------------------------------------------------------------------------------

    def _client_called(self, channel: Channel) -> None:
        client = Client(channel)

        def heard(message: Any, attachment: bytes) -> None:
            match message:
                case Submit():
                    self._submit(client, message, attachment)
                case Cancelled(request=theirs):
                    ours = client.ours.get(theirs)
                    if ours is not None:
                        client.leave(ours)
                        self._driver.cancel(ours)
                case Ask():
                    self._spawn(self._report(channel, message))
                case Note():
                    self._driver.records.noted(message)
                case Look(number=number):
                    channel.say(Report(number), msgspec.json.encode({"records": self._look(message)}))
                case Retire(number=number):
                    channel.say(Report(number), msgspec.json.encode(self._retire(message)))
                case _:
                    raise ProtocolError(f"an API process does not say {type(message).__name__}")

        channel.heard = heard
        channel.lost = lambda why: self._driver.drop_client(client)

    def _submit(self, client: Client, message: Submit, attachment: bytes) -> None:
        ticket = unpack_ticket(attachment)
        if message.request in client.ours or not fits(message, ticket, self._card.block_size):
            raise ProtocolError("a Submit whose number or lengths are wrong")
        check_ids(unpack_ids(ticket.tokens), self._card.vocab_size)
        check_ids((token for token, _ in ticket.sampling.logit_bias), self._card.vocab_size)
        check_ids((*ticket.sampling.stop_ids, *ticket.sampling.allowed_ids), self._card.vocab_size)
        ours = next(self._numbers)
        client.enter(message.request, ours)
        event = Submitted(ours, message.num_prompt, message.max_new, message.hashes, message.priority)
        self._driver.submit(client, event, ticket, Label(message.ident, message.caller, message.index))

    def _look(self, asked: Look) -> list[dict[str, Any]]:
        """What became of some requests."""
        records, now = self._driver.records, self._clock()
        return records.find(now, asked.name) if asked.name else records.latest(now, asked.limit)

    async def _report(self, channel: Channel, asked: Ask) -> None:
        """Ask every worker how it is; one that does not answer in time is shown as silent."""
        rows = await asyncio.gather(*(self._ask(joined) for joined in list(self._workers.values())))
        state = health.report(self._driver, self._clock(), rows) | {"workers": rows}
        telemetry = self._driver.records.telemetry
        telemetry.look(rows)
        if asked.metrics:
            state["metrics"] = telemetry.expose()
        channel.say(Report(asked.number), msgspec.json.encode(state))

    async def _ask(self, joined: Joined) -> dict[str, Any]:
        card, number = joined.card, next(self._numbers)
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._reports[card.worker, number] = lambda data: None if answer.done() else answer.set_result(data)
        row: dict[str, Any] = {"id": card.worker, "role": card.role, "pid": card.pid, "incarnation": card.incarnation}
        row["address"] = card.address
        joined.channel.say(Ask(number))
        try:
            said = state_of(await asyncio.wait_for(answer, REPORT_S))
        except ProtocolError as error:
            log.error("worker %s does not say how it is: %s", card.worker, error)
            return row | {"state": "silent"}
        except TimeoutError:
            self._reports.pop((card.worker, number), None)
            return row | {"state": "silent"}
        draining = card.worker in self._driver.policy.drains
        state = "joining" if not joined.up else "draining" if draining else "up"
        return said | row | {"state": state}

    # --- the driver's ports --------------------------------------------------------------------------------------

    def dismiss(self, worker: str) -> None:
        joined = self._workers.get(worker)
        if joined is not None:
            joined.channel.say(Dismiss(worker))
            self._worker_lost(joined.channel, "it was dismissed", logging.INFO)
            joined.channel.close("it was dismissed")

    def send(self, worker: str, order: Place | Cancel | Drain, attachment: bytes) -> None:
        joined = self._workers.get(worker)
        if joined is not None:  # else it was lost a moment ago, and policy is about to hear so
            joined.channel.say(order, attachment)

    def deliver(self, client: Client, message: Deliver, attachment: bytes) -> None:
        over = bool(message.reason or message.status)
        theirs = client.leave(message.request) if over else client.theirs.get(message.request)
        if theirs is not None:
            client.channel.say(msgspec.structs.replace(message, request=theirs), attachment)

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def main() -> None:
    """The process's entry."""

    async def work(orders: process.Orders) -> None:
        await RouterProcess(orders).main()

    process.run(work)


if __name__ == "__main__":
    main()
