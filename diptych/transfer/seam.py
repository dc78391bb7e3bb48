"""The seam between deciding and moving: what every KV transport offers, whatever carries the bytes.

A plan is indices, never addresses. The receiver is the only writer of its own memory (pull), so an abort is a
local matter: `cancel()` asks, and only `settled` says that no byte can land any more. Knows nothing of
requests, leases or scheduling: a *permit* is bytes that a plan shows and whose owner knows what they mean.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from diptych.transfer.layout import Layout
from diptych.transfer.pool import Pool

Lane = Literal["local", "shm", "tcp"]
Codec = Literal["raw", "int8"]
Wish = Literal["raw", "int8", "auto"]
Readable = Callable[[bytes, list[int]], bool]  # whether a permit is good for these blocks now; on any thread
Landed = Callable[[int, float], None]  # so many bytes are here, that began to come at that `perf_counter`
PERMIT_BYTES = 24
NO_PERMIT = bytes(PERMIT_BYTES)


@dataclass(frozen=True, slots=True)
class Plan:
    """Which of the peer's blocks go into which of ours.

    source, target: int32 [n] block ids. checksums: uint64 [n] as computed at the source, or None to skip verifying.
    layers: (first, end) of a layer range, heads: (first, end) of a KV-head range; None means all of them. Checksums
    cover whole blocks, so a plan that reads part of a block carries none. codec: how the blocks should travel where
    that takes a wire: "raw", "int8" (not what was computed, but close: `codec.py`), or "auto", int8 where it is faster.
    permit: what the source gave with its word that these blocks may be read.
    """

    source: NDArray[np.int32]
    target: NDArray[np.int32]
    checksums: NDArray[np.uint64] | None = None
    layers: tuple[int, int] | None = None
    heads: tuple[int, int] | None = None
    codec: Wish = "raw"
    permit: bytes = NO_PERMIT


@dataclass(frozen=True, slots=True)
class Stats:
    """What a finished read cost: bytes of KV, and seconds in all.

    codec: how they travelled, and `why`; `wire_bytes` is what then travelled.
    """

    num_bytes: int
    elapsed_s: float
    codec: Codec = "raw"
    wire_bytes: int = 0
    why: str = ""


class Transfer(Protocol):
    """One read on its way. `settled` resolves (with None) when no byte can land any more, however it ended.

    Wait for `settled` with a callback, `asyncio.wait` or `asyncio.shield`: `wait_for` would cancel the future itself.
    The outcome may be known earlier: `done` raises as soon as the read was cancelled, late or lost its peer.
    """

    settled: asyncio.Future[None]

    async def done(self) -> Stats:
        """Wait for the bytes, verified; raises PeerLost, ProtocolError, TransferError (late, checksum, cancelled)."""

    def cancel(self) -> None:
        """Ask to stop; frees nothing."""


class Peer(Protocol):
    """A connected source of blocks. `lost` resolves with the reason (str) when the other side is gone.

    `lane`: how the bytes come, for people to see: a slow way that was taken silently is the commonest complaint.
    """

    layout: Layout
    lane: Lane
    lost: asyncio.Future[str]

    def read(self, plan: Plan, deadline_s: float) -> Transfer:
        """Start a read that must be over in `deadline_s` seconds from now.

        Never raises: a plan that cannot be carried out, or a lost peer, is a transfer that has failed and is settled.
        """

    async def close(self) -> None:
        """Drop mappings and connections at once; reads under way fail."""


class Transport(Protocol):
    """One per worker. Methods are called on the worker's event loop; copies run off it."""

    def register(self, pool: Pool, readable: Readable | None = None) -> None:
        """Export the pool; once, before `describe`.

        readable: is asked about each read, where the owner takes part in it (not over shared memory); None grants all.
        """

    def describe(self) -> bytes:
        """What a peer needs to connect (msgpack: kind, worker, incarnation, layout card, address). Ours to carry."""

    async def connect(self, description: bytes, timeout_s: float = 5.0) -> Peer:
        """Connect to the worker so described; raises LayoutMismatch, PeerLost, ProtocolError."""

    def checksum(self, blocks: NDArray[np.int32]) -> NDArray[np.uint64]:
        """uint64 [n]: checksums of blocks of our own pool."""

    async def close(self, drain_s: float = 5.0) -> None:
        """Wait for reads under way, at most `drain_s`, then unmap the peers. The registered pool stays its maker's."""
