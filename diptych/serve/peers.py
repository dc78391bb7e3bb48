"""A worker's connections to all the others: made when they join, made again when they break, and what the router hears.

The newer of two workers calls the older, and calls again, later each time, for as long as the router has not said
that the other is gone. Each side sends its card, connects to the other's blocks and says Ready. Not responsible for
what is said over a connection (`worker.py`) nor for moving blocks (`transfer/`).
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

from diptych.errors import PeerLost, ProtocolError, TransferError
from diptych.policy.membership import LinkDown, LinkUp
from diptych.serve.channel import Channel, call
from diptych.serve.wire import Hello, Ready, Register
from diptych.serve.worker_ports import ToPeer
from diptych.transfer.seam import Peer, Transport

log = logging.getLogger(__name__)

JOIN_S = 5.0  # how long a peer may take to answer, and then to be ready
FIRST_WAIT_S, LONGEST_WAIT_S = 0.1, 5.0  # between two calls to a peer that does not answer
_FROM_PEERS = get_args(ToPeer)


@dataclass(frozen=True, slots=True)
class Link:
    """One peer: its control channel, and its blocks."""

    name: str
    channel: Channel
    source: Peer
    incarnation: int


class Peers:
    """All peers of one worker. `heard(peer, message, attachment)` gets what they say, `lost(peer)` who is out of reach.

    `report` takes to the router whom we can reach, once we are `up`.
    """

    def __init__(
        self,
        me: Hello,
        key: str,
        transport: Transport,
        card: Callable[[], Register],
        heard: Callable[[str, Any, bytes], None],
        lost: Callable[[str], None],
        report: Callable[[LinkDown | LinkUp], None],
    ):
        self._me, self._key = me, key
        self._transport = transport
        self._card = card
        self._heard, self._lost, self._report = heard, lost, report
        self._links: dict[str, Link] = {}
        self._called: dict[str, str] = {}  # the addresses of those that we call
        self._down: set[str] = set()  # whom we cannot reach
        self._up = False
        self._tasks: set[asyncio.Task[None]] = set()

    def get(self, peer: str) -> Link | None:
        """The connection to a peer, if there is one."""
        return self._links.get(peer)

    async def meet(self, peers: tuple[tuple[str, str], ...]) -> None:
        """Connect to (name, address) each, both ways. One that is dead or hangs is no reason not to work."""
        self._called |= dict(peers)
        await asyncio.gather(*(self._call(name, address) for name, address in peers))
        for name, address in peers:
            if name not in self._links:
                self._down.add(name)
                self._spawn(self._keep_calling(name, address))

    def be_up(self) -> None:
        """We are about to be given work: say whom we cannot reach, now and from now on."""
        self._up = True
        for peer in sorted(self._down):
            self._report(LinkDown(self._me.name, peer))

    def be_called(self, channel: Channel, hello: Hello) -> None:
        """A peer calls us. If we knew it before, that connection is over."""
        if hello.name in self._links:
            self._unlink(self._links[hello.name].channel, "it called again")
        self._meet_peer(channel)
        channel.say(self._card())

    def forget(self, peer: str, incarnation: int) -> None:
        """The router says that it is gone: call it no more, and hang up, since one that is stuck does not."""
        self._called.pop(peer, None)
        link = self._links.get(peer)
        if link is not None and link.incarnation <= incarnation:  # else its successor has called already
            self._unlink(link.channel, "the router gave it up")

    def close(self) -> None:
        """Hang up on everybody."""
        self._called.clear()
        for link in list(self._links.values()):
            link.channel.close()

    # --- calling -------------------------------------------------------------------------------------------------

    async def _call(self, peer: str, address: str, level: int = logging.WARNING) -> None:
        ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        channel: Channel | None = None
        try:
            meet = partial(self._meet_peer, ready=ready)
            channel = await call(address, self._key, self._me, meet, JOIN_S, expect=peer)
            channel.say(self._card())
            await asyncio.wait_for(ready, JOIN_S)
        except (TransferError, TimeoutError) as error:
            why = str(error) or "it did not get ready in time"
            log.log(level, "peer %s: %s", peer, why)
            if channel is not None:
                channel.close(why)

    async def _keep_calling(self, peer: str, address: str) -> None:
        wait_s = FIRST_WAIT_S
        while True:
            await asyncio.sleep(wait_s)
            if peer in self._links or self._called.get(peer) != address:
                return
            await self._call(peer, address, logging.DEBUG)  # that it is out of reach was said when it began
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)

    # --- meeting -------------------------------------------------------------------------------------------------

    def _meet_peer(self, channel: Channel, ready: "asyncio.Future[None] | None" = None) -> None:
        """Both sides send their card, connect to the other's blocks and then say Ready; `ready` is set on both."""
        state = {"met": False, "linked": False, "ready": False}

        def step(key: str) -> None:
            state[key] = True
            if all(state.values()) and ready is not None and not ready.done():
                ready.set_result(None)

        async def link(card: Register) -> None:
            if await self._connect(channel, card):
                channel.say(Ready(self._me.name))
                step("linked")

        def heard(message: Any, attachment: bytes) -> None:
            match message:
                case Register() if message.worker == channel.name and not state["met"]:
                    state["met"] = True
                    self._spawn(link(message))
                case Ready():
                    step("ready")
                case _ if isinstance(message, _FROM_PEERS):
                    self._heard(channel.name, message, attachment)
                case _:
                    raise ProtocolError(f"a peer does not say {type(message).__name__}")

        def lost(why: str) -> None:
            self._unlink(channel, why)
            if ready is not None and not ready.done():
                ready.set_exception(PeerLost(why))

        channel.heard, channel.lost = heard, lost

    async def _connect(self, channel: Channel, card: Register) -> bool:
        """Connect to a peer's blocks; True where there is a link now."""
        try:
            source = await self._transport.connect(card.transport)
        except TransferError as error:
            log.error("cannot read the blocks of %s: %s", card.worker, error)
            channel.close(str(error))
            return False
        if not channel.is_open:  # it hung up meanwhile
            await source.close()
            return False
        if (earlier := self._links.get(card.worker)) is not None:  # it called twice, and both were under way
            self._unlink(earlier.channel, "it called again")
        link = self._links[card.worker] = Link(card.worker, channel, source, card.incarnation)
        source.lost.add_done_callback(lambda reason: self._unlink(channel, reason.result()))
        if link.name in self._down:
            self._down.discard(link.name)
            if self._up:
                self._report(LinkUp(self._me.name, link.name))
        return True

    def _unlink(self, channel: Channel, why: str) -> None:
        """A peer is gone or out of reach; say so once, let go of its memory, and call it again if it was us who did."""
        link = next((link for link in self._links.values() if link.channel is channel), None)
        if link is None:
            return
        del self._links[link.name]
        log.info("peer %s is out of reach: %s", link.name, why)
        channel.drop(why)
        self._spawn(link.source.close())
        self._down.add(link.name)
        if self._up:
            self._report(LinkDown(self._me.name, link.name))
        self._lost(link.name)
        if link.name in self._called:
            self._spawn(self._keep_calling(link.name, self._called[link.name]))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
