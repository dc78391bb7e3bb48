"""The router's process: sockets to every worker and API process, and the driver.

Introduces workers to each other: a new one is told who is there, connects to all of them, and only then is given work.
Not responsible for decisions (`policy/router.py`) nor for what they mean (`router.py`).
"""

import asyncio
import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from diptych.errors import ProtocolError
from diptych.journal import Journal
from diptych.policy.messages import Cancel, Cancelled, Emit, Finish, Place, Role, Submitted, WorkerUp
from diptych.policy.router import Router
from diptych.serve import process
from diptych.serve.channel import Channel, listen
from diptych.serve.clock import Clock
from diptych.serve.router import RouterDriver
from diptych.serve.wire import Ask, Bye, Deliver, Hello, Meet, Ready, Register, Report, Submit, unpack_ticket

log = logging.getLogger(__name__)

REPORT_S = 1.0  # how long a worker may take to say how it is
STALL_S = 30.0  # with requests in flight, a cluster in which no token moved for so long is not healthy


@dataclass(slots=True)
class Joined:
    """A worker that registered; `up` once it is connected to its peers."""

    channel: Channel
    card: Register
    up: bool = False


class Client:
    """An API process: its channel, and its numbers for its requests beside ours."""

    def __init__(self, channel: Channel):
        self.channel = channel
        self.ours: dict[int, int] = {}
        self.theirs: dict[int, int] = {}

    def enter(self, theirs: int, ours: int) -> None:
        """A request was handed in."""
        self.ours[theirs], self.theirs[ours] = ours, theirs

    def leave(self, ours: int) -> int | None:
        """A request is over; returns the client's number."""
        theirs = self.theirs.pop(ours, None)
        if theirs is not None:
            del self.ours[theirs]
        return theirs


class RouterProcess:
    """Implements the driver's ports over real sockets."""

    def __init__(self, orders: process.Orders):
        self._orders = orders
        cluster = orders.cluster
        self._journal = (
            Journal(Path(cluster.journal), "router", orders.incarnation, cluster.router) if cluster.journal else None
        )
        self._clock = Clock()
        self._driver = RouterDriver(Router(cluster.router), self, self._clock, self._journal)
        self._workers: dict[str, Joined] = {}
        self._reports: dict[int, Callable[[bytes], None]] = {}
        self._numbers = itertools.count(1)
        self._tasks: set[asyncio.Task[None]] = set()

    async def main(self) -> None:
        """Serve until told to stop."""
        server = await listen(self._orders.router, self._orders.key, "router", self._called)
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            server.close()
            if self._journal is not None:
                self._journal.close()

    def _called(self, channel: Channel, hello: Hello) -> None:
        if hello.kind == "worker":
            self._worker_called(channel)
        elif hello.kind == "api":
            self._client_called(channel)
        else:
            raise ProtocolError(f"a router has nothing to say to a {hello.kind!r}")

    # --- workers -------------------------------------------------------------------------------------------------

    def _worker_called(self, channel: Channel) -> None:
        def heard(message: Any, attachment: memoryview) -> None:
            match message:
                case Emit() | Finish():
                    self._driver.heard(channel.name, message, attachment)
                case Report(number=number):
                    answered = self._reports.pop(number, None)
                    if answered is not None:
                        answered(bytes(attachment))
                case Register():
                    self._register(channel, message)
                case Ready():
                    self._ready(channel)
                case Bye():
                    self._worker_lost(channel, "it was told to stop", logging.INFO)
                case _:
                    raise ProtocolError(f"a worker does not say {type(message).__name__}")

        channel.heard = heard
        channel.lost = lambda why: self._worker_lost(channel, why)

    def _register(self, channel: Channel, card: Register) -> None:
        known = self._workers.get(channel.name)
        if known is not None:
            if known.card.incarnation >= card.incarnation:
                channel.close(f"a worker {channel.name} is here already")
                return
            self._worker_lost(known.channel, "a new incarnation has come")
        peers = tuple((joined.card.worker, joined.card.address) for joined in self._workers.values())
        self._workers[channel.name] = Joined(channel, card)
        channel.say(Meet(peers))

    def _ready(self, channel: Channel) -> None:
        joined = self._workers.get(channel.name)
        if joined is None or joined.channel is not channel or joined.up:
            raise ProtocolError("Ready without Register")
        joined.up = True
        card = joined.card
        self._driver.worker_up(
            WorkerUp(card.worker, card.incarnation, Role(card.role), card.num_blocks, card.block_size)
        )

    def _worker_lost(self, channel: Channel, why: str, level: int = logging.WARNING) -> None:
        joined = self._workers.get(channel.name)
        if joined is None or joined.channel is not channel:
            return
        log.log(level, "worker %s is lost: %s", channel.name, why)
        del self._workers[channel.name]
        if joined.up:
            self._driver.worker_lost(channel.name)

    # --- API processes -------------------------------------------------------------------------------------------

    def _client_called(self, channel: Channel) -> None:
        client = Client(channel)

        def heard(message: Any, attachment: memoryview) -> None:
            match message:
                case Submit():
                    self._submit(client, message, attachment)
                case Cancelled(request=theirs):
                    ours = client.ours.get(theirs)
                    if ours is not None:
                        client.leave(ours)
                        self._driver.cancel(ours)
                case Ask(number=number):
                    self._spawn(self._report(channel, number))
                case _:
                    raise ProtocolError(f"an API process does not say {type(message).__name__}")

        channel.heard = heard
        channel.lost = lambda why: self._driver.drop_client(client)

    def _submit(self, client: Client, message: Submit, attachment: memoryview) -> None:
        ticket = unpack_ticket(attachment)
        if message.request in client.ours or len(ticket.tokens) != 4 * message.num_prompt or message.num_prompt < 1:
            raise ProtocolError("a Submit whose number or lengths are wrong")
        ours = next(self._numbers)
        client.enter(message.request, ours)
        event = Submitted(ours, message.num_prompt, message.max_new, message.hashes, message.priority)
        self._driver.submit(client, event, ticket)

    async def _report(self, channel: Channel, number: int) -> None:
        """Ask every worker how it is; one that does not answer in time is shown as silent."""
        rows = await asyncio.gather(*(self._ask(joined) for joined in list(self._workers.values())))
        idle_s = self._clock() - self._driver.last_token
        num_open = self._driver.num_open
        paths = self._driver.policy.num_paths()
        state = {
            "healthy": paths > 0 and (num_open == 0 or idle_s < STALL_S),
            "paths": paths,
            "requests": num_open,
            "last_token_s": round(idle_s, 3),
            "broken_streams": self._driver.num_broken,
            "totals": self._driver.policy.num,
            "workers": rows,
        }
        channel.say(Report(number), msgspec.json.encode(state))

    async def _ask(self, joined: Joined) -> dict[str, Any]:
        number = next(self._numbers)
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._reports[number] = lambda data: None if answer.done() else answer.set_result(data)
        card = joined.card
        row: dict[str, Any] = {"id": card.worker, "role": card.role, "pid": card.pid, "incarnation": card.incarnation}
        joined.channel.say(Ask(number))
        try:
            data = await asyncio.wait_for(answer, REPORT_S)
        except TimeoutError:
            self._reports.pop(number, None)
            return row | {"state": "silent"}
        return row | {"state": "up" if joined.up else "joining"} | msgspec.json.decode(data, type=dict[str, Any])

    # --- the driver's ports --------------------------------------------------------------------------------------

    def send(self, worker: str, order: Place | Cancel, attachment: bytes) -> None:
        joined = self._workers.get(worker)
        if joined is not None:  # else it was lost a moment ago, and policy is about to hear so
            joined.channel.say(order, attachment)

    def deliver(self, client: Client, message: Deliver, attachment: bytes) -> None:
        over = bool(message.reason or message.status)
        theirs = client.leave(message.request) if over else client.theirs.get(message.request)
        if theirs is not None:
            client.channel.say(replace(message, request=theirs), attachment)

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
