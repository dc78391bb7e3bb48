"""KV transport between workers that live in one process: the same seam and rules, no sockets.

For harnesses, single-process serving and the contract tests. Who can find whom is a `LocalRegistry` that its users
share, not a global. Not responsible for the copies themselves (`reading.py`, `copying.py`).
"""

from functools import partial

import numpy as np
from numpy.typing import NDArray

from diptych.errors import ConfigError, PeerLost
from diptych.transfer import copying, description, native
from diptych.transfer.description import Description
from diptych.transfer.pool import Pool
from diptych.transfer.reading import ThreadedPeer, settle
from diptych.transfer.seam import Readable


class LocalRegistry:
    """The workers of this process that can be connected to, by name and incarnation."""

    def __init__(self) -> None:
        self._transports: dict[tuple[str, int], LocalTransport] = {}

    def add(self, transport: "LocalTransport") -> None:
        """Make a transport findable."""
        self._transports[transport.worker, transport.incarnation] = transport

    def find(self, worker: str, incarnation: int) -> "LocalTransport":
        """That worker in that incarnation; PeerLost where it is not (or no longer) there."""
        transport = self._transports.get((worker, incarnation))
        if transport is None:
            raise PeerLost(f"worker {worker} (incarnation {incarnation}) is not in this process")
        return transport

    def remove(self, transport: "LocalTransport") -> None:
        """Forget a transport; unknown ones are ignored."""
        self._transports.pop((transport.worker, transport.incarnation), None)


class LocalTransport:
    """Implements `seam.Transport`. The pool it registers stays its creator's to close, after `close`."""

    def __init__(self, worker: str, incarnation: int, registry: LocalRegistry):
        self.worker, self.incarnation = worker, incarnation
        self._registry = registry
        self._pool: Pool | None = None
        self._readable: Readable | None = None
        self._readers: set[ThreadedPeer] = set()  # they read from us
        self._peers: set[ThreadedPeer] = set()  # we read from them

    @property
    def pool(self) -> Pool:
        """The registered pool."""
        if self._pool is None:
            raise ConfigError(f"worker {self.worker} has not registered a pool")
        return self._pool

    def register(self, pool: Pool, readable: Readable | None = None) -> None:
        """Let others in this process read what is readable. May compile the copy routines on the first call of all."""
        native.available()
        self._pool, self._readable = pool, readable
        self._registry.add(self)

    def describe(self) -> bytes:
        """What a peer needs to connect."""
        pool = self.pool
        return description.encode(Description("local", self.worker, self.incarnation, pool.layout, pool.num_blocks))

    async def connect(self, description: bytes, timeout_s: float = 5.0) -> ThreadedPeer:
        """Connect to a worker of the same registry; raises LayoutMismatch, PeerLost, ProtocolError."""
        source = self._source(description)
        name = f"worker {source.worker} (incarnation {source.incarnation})"

        def release() -> None:
            source._readers.discard(peer)
            self._peers.discard(peer)

        prepare = partial(copying.prepare, source.pool, self.pool, readable=source._readable)
        peer = ThreadedPeer(name, source.worker, "local", source.pool.layout, prepare, release)
        source._readers.add(peer)
        self._peers.add(peer)
        return peer

    def _source(self, data: bytes) -> "LocalTransport":
        said = description.decode(data, "local")
        self.pool.layout.check(said.layout)
        return self._registry.find(said.worker, said.incarnation)

    def checksum(self, blocks: NDArray[np.int32]) -> NDArray[np.uint64]:
        """uint64 [n]: checksums of blocks of our own pool."""
        return copying.checksum(self.pool, blocks)

    def vanish(self, reason: str = "killed") -> None:
        """What a kill -9 does, for harnesses: those who read from us lose their peer, and nothing is drained."""
        self._registry.remove(self)
        for peer in tuple(self._readers | self._peers):
            peer.lose(reason)

    async def close(self, drain_s: float = 5.0) -> None:
        """Take no more reads in either direction, wait for those under way at most `drain_s`, then drop the peers."""
        self._registry.remove(self)
        peers = tuple(self._readers | self._peers)
        for peer in peers:
            peer.leave(f"worker {self.worker} is closing")
        await settle(peers, drain_s)
        for peer in peers:
            await peer.close()
