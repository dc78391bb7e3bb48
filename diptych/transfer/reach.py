"""Both ways to a peer as one transport: shared memory where it is on this host, TCP where it is not.

A worker offers what it has; whoever connects picks. Shared memory takes the same host (the kernel's boot id), and a
socket file of our own user that exists here (a container of the same host may not see it). Which lane was taken is
said in the log and in `peer.lane`; on one host the slow one is never taken without a warning.

Not responsible for either way (`shm.py`, `tcp.py`).
"""

import asyncio
import logging
import os
import stat
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from diptych.errors import ConfigError, PeerLost, ProtocolError
from diptych.transfer import description
from diptych.transfer.pool import Pool
from diptych.transfer.reading import ThreadedPeer
from diptych.transfer.seam import Readable
from diptych.transfer.shm import ShmTransport
from diptych.transfer.tcp import TcpTransport

log = logging.getLogger(__name__)

Force = Literal["auto", "shm", "tcp"]
_Described = Annotated[bytes, msgspec.Meta(max_length=description.MAX_BYTES)]


class Offer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a worker says of itself: its host, and each way's description; empty where it does not offer that way."""

    host: Annotated[str, msgspec.Meta(max_length=64)]
    shm: _Described = b""
    tcp: _Described = b""


class Transports:
    """Implements `seam.Transport` by two others.

    listen: "host:port" for TCP readers, port 0 for a free one; None to be read over shared memory only. advertise: as
    for `TcpTransport`. force: "auto", or the one way to offer and to take. Without a key there is no TCP.
    """

    def __init__(
        self,
        worker: str,
        incarnation: int,
        runtime_dir: str | Path,
        key: str,
        listen: str | None = None,
        advertise: str | None = None,
        force: Force = "auto",
    ):
        if force == "tcp" and listen is None:
            raise ConfigError(f"worker {worker} is to be read over TCP only, but has no address to listen at")
        self.worker, self.incarnation, self._listens = worker, incarnation, listen is not None
        self._shm = ShmTransport(worker, incarnation, runtime_dir) if force != "tcp" else None
        wanted = force != "shm" and (key or self._listens)
        self._tcp = TcpTransport(worker, incarnation, key, listen, advertise) if wanted else None

    @property
    def pool(self) -> Pool:
        """The registered pool."""
        return self._ways[0].pool

    @property
    def _ways(self) -> list[ShmTransport | TcpTransport]:
        return [way for way in (self._shm, self._tcp) if way is not None]

    def register(self, pool: Pool, readable: Readable | None = None) -> None:
        """Export the pool every way; once. Over TCP only what is readable."""
        for way in self._ways:
            way.register(pool, readable)

    def describe(self) -> bytes:
        """What a peer needs to connect, here or elsewhere."""
        shm = self._shm.describe() if self._shm is not None else b""
        tcp = self._tcp.describe() if self._tcp is not None and self._listens else b""
        return msgspec.msgpack.encode(Offer(host_id(), shm, tcp))

    async def connect(self, description: bytes, timeout_s: float = 5.0) -> ThreadedPeer:
        """Connect the best way there is; raises LayoutMismatch, PeerLost, ProtocolError."""
        offer = _decode(description)
        if self._shm is not None and offer.shm and (self._tcp is None or not offer.tcp or self._is_near(offer)):
            peer = await self._shm.connect(offer.shm, timeout_s)
        elif self._tcp is not None and offer.tcp:
            peer = await self._tcp.connect(offer.tcp, timeout_s)
        else:
            raise PeerLost(f"there is no way to a peer: {_ways_of(offer)} offered, {self._ways_here()} possible here")
        log.info("KV of %s comes over %s", peer.name, peer.lane)
        return peer

    def _is_near(self, offer: Offer) -> bool:
        """Whether the peer's memory can be mapped here."""
        if not offer.host or offer.host != host_id():
            return False
        path = description.decode(offer.shm, "shm").path
        if _is_our_socket(path):
            return True
        log.warning(
            "%s is on this host but cannot be reached from here (another container?): TCP, which is slower", path
        )
        return False

    def _ways_here(self) -> str:
        return " and ".join(name for name, way in (("shm", self._shm), ("tcp", self._tcp)) if way is not None)

    def checksum(self, blocks: NDArray[np.int32]) -> NDArray[np.uint64]:
        """uint64 [n]: checksums of blocks of our own pool."""
        return self._ways[0].checksum(blocks)

    async def close(self, drain_s: float = 5.0) -> None:
        """As `seam.Transport.close`, both ways at once."""
        await asyncio.gather(*(way.close(drain_s) for way in self._ways))


def host_id() -> str:
    """What tells this host, since it was started, from all others; empty where the kernel does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _is_our_socket(path: str) -> bool:
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # ValueError: a NUL in it
        return False
    return stat.S_ISSOCK(found.st_mode) and found.st_uid == os.geteuid()


def _ways_of(offer: Offer) -> str:
    return " and ".join(name for name in ("shm", "tcp") if getattr(offer, name)) or "nothing is"


def _decode(data: bytes) -> Offer:
    if len(data) > 3 * description.MAX_BYTES:
        raise ProtocolError(f"a transport description of {len(data)} bytes")
    try:
        return msgspec.msgpack.decode(data, type=Offer)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"not a transport description: {error}") from error
