"""Slow links on a fast machine: what a peer's reads bring is held back until it would have crossed the link.

A link is one direction between two workers. Bytes cross it one after the other, in the order in which they come, as
they do with the transport itself; the peer's thread sleeps until the last of a part is due, and nothing of the part is
used before. Sleeping ends within `LOOK_S` when a read is cancelled, late or lost, so the transport's promises hold.
Where no links are to be emulated none of this is in the way: there is no `EmulatedTransport`, and peers have no `pace`.

Not responsible for moving bytes, for whole networks (no two links share anything), nor for latency.
"""

import threading
import time
from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from diptych.errors import TransferError
from diptych.transfer import native
from diptych.transfer.pool import Pool
from diptych.transfer.reading import ThreadedPeer
from diptych.transfer.seam import Readable, Transport

LOOK_S = 5e-3


class Link:
    """Bytes cross at `bytes_per_s`, none before the link was free. Any number of threads may send over it."""

    def __init__(
        self,
        bytes_per_s: float,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self.bytes_per_s = bytes_per_s
        self._clock, self._sleep = clock, sleep
        self._lock = threading.Lock()
        self._free_at = 0.0

    def cross(self, flag: native.Flag, num_bytes: int, began: float) -> None:
        """Wait until so many bytes, of a stream that began then, are across; TransferError where the flag is set."""
        with self._lock:
            due = self._free_at = max(self._free_at, began) + num_bytes / self.bytes_per_s
        while (left := due - self._clock()) > 0:
            if flag[0]:
                raise TransferError("cancelled on its way")
            self._sleep(min(left, LOOK_S))


class EmulatedTransport:
    """Implements `seam.Transport` by another one, with links as slow as `rate(worker)`; None leaves one as it is."""

    def __init__(self, transport: Transport, rate: Callable[[str], float | None]):
        self._transport, self._rate = transport, rate
        self._links: dict[str, Link] = {}  # by the source: its next incarnation is on the same link

    def register(self, pool: Pool, readable: Readable | None = None) -> None:
        """Export the pool."""
        self._transport.register(pool, readable)

    def describe(self) -> bytes:
        """What a peer needs to connect; how fast it will read is its own affair."""
        return self._transport.describe()

    async def connect(self, description: bytes, timeout_s: float = 5.0) -> ThreadedPeer:
        """Connect, and slow down; raises what the transport raises."""
        peer = await self._transport.connect(description, timeout_s)
        assert isinstance(peer, ThreadedPeer), "every transport's peers are"
        rate = self._rate(peer.worker)
        if rate is not None:
            link = self._links.setdefault(peer.worker, Link(rate))
            peer.pace = lambda flag: partial(link.cross, flag)
        return peer

    def checksum(self, blocks: NDArray[np.int32]) -> NDArray[np.uint64]:
        """uint64 [n]: checksums of blocks of our own pool."""
        return self._transport.checksum(blocks)

    async def close(self, drain_s: float = 5.0) -> None:
        """As the transport does."""
        await self._transport.close(drain_s)
