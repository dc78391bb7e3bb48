"""KV transport between hosts: plain TCP sockets, from the source's pool into ours with no copy in between.

The source's process takes part in a read, so one that is stopped stalls it until its deadline. A dead process is seen
at once, by the end of its connections; a host that is off, or behind a cut cable, within `serving.VANISHED_S`.

Not responsible for the bytes (`stream.py` here, `serving.py` there), for who is let in (`introduction.py`), or for a
source that hangs: that is liveness, the driver's.
"""

import asyncio
import contextlib
import socket
from functools import partial

import numpy as np
from numpy.typing import NDArray

from diptych.errors import ConfigError, PeerLost, ProtocolError
from diptych.transfer import copying, description, frames, native
from diptych.transfer.description import Description
from diptych.transfer.introduction import Purpose, introduce
from diptych.transfer.pool import Pool
from diptych.transfer.reading import ThreadedPeer, new_thread, settle
from diptych.transfer.seam import Readable
from diptych.transfer.serving import BlockServer, set_up
from diptych.transfer.stream import Stream


class TcpTransport:
    """Implements `seam.Transport`. The pool it registers stays its creator's to close, after `close`.

    key: the cluster's; readers and owners prove to each other that they have it. listen: "host:port", port 0 for a
    free one, or None to read from others and serve nobody. advertise: "host" or "host:port", where others are to
    connect if that is not where we listen. One per worker; all calls on one event loop.
    """

    def __init__(
        self, worker: str, incarnation: int, key: str, listen: str | None = None, advertise: str | None = None
    ):
        if not key:
            raise ConfigError("KV over TCP needs the cluster's key: whoever has it can read all KV")
        self.worker, self.incarnation, self._key = worker, incarnation, key
        self._address = None if listen is None else split_address(listen)
        self._advertise = None if advertise is None else split_address(advertise, port=0)
        if self._address and _is_wildcard(self._address[0]) and self._advertise is None:
            raise ConfigError(f"{listen} is every interface of this host: say where others are to connect (advertise)")
        self._server: BlockServer | None = None
        self._at = "", 0
        self._pool: Pool | None = None
        self._peers: set[ThreadedPeer] = set()

    @property
    def pool(self) -> Pool:
        """The registered pool."""
        if self._pool is None:
            raise ConfigError(f"worker {self.worker} has not registered a pool")
        return self._pool

    def register(self, pool: Pool, readable: Readable | None = None) -> None:
        """Serve what is readable of the pool, if we listen; once.

        May compile the copy routines on the first call on this machine.
        """
        if self._pool is not None:
            raise ConfigError(f"worker {self.worker} has registered a pool already")
        native.available()
        if self._address is not None:
            listener = _listen(*self._address)
            host, port = self._advertise or (self._address[0], 0)
            self._at = host, port or listener.getsockname()[1]
            self._server = BlockServer(pool, self.worker, self.incarnation, self._key, listener, readable)
        self._pool = pool

    def describe(self) -> bytes:
        """What a peer needs to connect, from any host that can reach the address."""
        pool = self.pool
        if self._server is None:
            raise ConfigError(f"worker {self.worker} does not listen for KV readers")
        facts = self.worker, self.incarnation, pool.layout, pool.num_blocks
        return description.encode(Description("tcp", *facts, host=self._at[0], port=self._at[1]))

    async def connect(self, description: bytes, timeout_s: float = 5.0) -> ThreadedPeer:
        """Connect to the worker so described; raises LayoutMismatch, PeerLost, ProtocolError."""
        said = self._check(description)
        name = f"worker {said.worker} (incarnation {said.incarnation})"
        socks: list[socket.socket] = []
        try:
            async with asyncio.timeout(timeout_s):
                for purpose in (Purpose.READ, Purpose.WATCH):
                    await _dial(said, socks)
                    await introduce(socks[-1], said, self._key, purpose, name)
        except BaseException as error:
            for sock in socks:
                sock.close()
            if isinstance(error, TimeoutError):
                raise PeerLost(f"{name} did not answer within {timeout_s:g} s") from error
            if isinstance(error, OSError | ValueError):  # ValueError: a name that no host can have
                raise PeerLost(f"{name} cannot be reached at {said.host}:{said.port}: {error}") from error
            raise
        return self._meet(name, said, *socks)

    def _check(self, data: bytes) -> Description:
        said = description.decode(data, "tcp")
        self.pool.layout.check(said.layout)
        if not said.host or not said.port:
            raise ProtocolError(f"worker {said.worker} gave no address: {said.host!r} port {said.port}")
        return said

    def _meet(self, name: str, said: Description, reading: socket.socket, watching: socket.socket) -> ThreadedPeer:
        loop, thread = asyncio.get_running_loop(), new_thread(name)

        def release() -> None:
            loop.remove_reader(watching)
            watching.close()
            stream.close()
            self._peers.discard(peer)

        def broke(why: str) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to be told
                loop.call_soon_threadsafe(peer.lose, why)

        stream = Stream(reading, said.num_blocks, self.pool, thread, name, broke)
        peer = ThreadedPeer(name, said.worker, "tcp", said.layout, stream.prepare, release, stream.interrupt, thread)
        loop.add_reader(watching, partial(_hear, watching, peer))
        self._peers.add(peer)
        return peer

    def checksum(self, blocks: NDArray[np.int32]) -> NDArray[np.uint64]:
        """uint64 [n]: checksums of blocks of our own pool."""
        return copying.checksum(self.pool, blocks)

    async def close(self, drain_s: float = 5.0) -> None:
        """Wait at most `drain_s` for reads under way, ours and those of our readers, then drop the connections."""
        peers = tuple(self._peers)
        for peer in peers:
            peer.leave(f"worker {self.worker} is closing")
        readers_gone = self._server.close(drain_s) if self._server is not None else asyncio.sleep(0)
        await asyncio.gather(settle(peers, drain_s), readers_gone)
        for peer in peers:
            await peer.close()


def _hear(sock: socket.socket, peer: ThreadedPeer) -> None:
    """Something came on the silent connection: a goodbye, or the end."""
    try:
        message = sock.recv(64)
    except BlockingIOError:
        return
    except OSError as error:
        peer.lose(f"the connection broke: {error}")
        return
    if message == frames.GOODBYE:
        peer.leave("it is closing")
    elif message:
        peer.lose("it said something that is not in the protocol")
    else:
        peer.lose("it closed the connection or died")


async def _dial(said: Description, socks: list[socket.socket]) -> None:
    """Connect to what was described, trying each of its addresses; the socket is appended to `socks` before."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(said.host, said.port, type=socket.SOCK_STREAM)
    failure = OSError(f"{said.host} has no address")
    for family, kind, protocol, _, address in found:
        sock = socket.socket(family, kind, protocol)
        socks.append(sock)
        sock.setblocking(False)
        set_up(sock)
        try:
            await loop.sock_connect(sock, address)
            return
        except OSError as error:
            socks.pop().close()
            failure = error
    raise failure


def split_address(text: str, port: int | None = None) -> tuple[str, int]:
    """("host", port) of "host:port", or of "host" where there is a default. Raises ConfigError."""
    host, colon, number = text.rpartition(":")
    if port is not None and (not colon or text.endswith("]")):
        host, number = text, str(port)
    host = host.removeprefix("[").removesuffix("]")
    if not host or not number.isdecimal() or int(number) >= 1 << 16:
        raise ConfigError(f"{text!r} is not an address; it should be host:port, or [host]:port for IPv6")
    return host, int(number)


def _is_wildcard(host: str) -> bool:
    return host in ("0.0.0.0", "::")


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise ConfigError(f"cannot listen for KV readers at {host}:{port}: {error}") from error
    listener.setblocking(False)
    return listener
