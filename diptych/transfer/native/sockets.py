"""Blocks over a socket: one native call per batch with the GIL released, or Python's `sendmsg` and `recvmsg_into`.

A batch is the same pieces of some blocks as one stream of bytes, sent from a pool and landed in another by iovecs, so
nothing is copied in between. As in the package's `__init__`, every id is checked against its pool here, on every call.
Pieces of a head slice go by iovecs too: a descriptor costs tens of nanoseconds, gathering would cost a second copy.

Not responsible for frames (`transfer/frames.py`) or for what a batch belongs to (`transfer/stream.py`).
"""

import os
import select
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from diptych.errors import ProtocolError
from diptych.transfer import native
from diptych.transfer.layout import Pieces

_IOVECS = 1024  # IOV_MAX of Linux
_LANDING_BYTES = 1 << 19  # as in sockets.h
_FALLBACK_IOVECS = 64  # each costs Python as much as some KiB of copying


@dataclass(frozen=True, slots=True)
class Batch:
    """Blocks of a pool, [num_blocks, block_bytes], by id, and which pieces of each. `batch` makes a checked one."""

    blocks: native.Blocks
    ids: native.Ids
    offsets: NDArray[np.int64]
    lengths: NDArray[np.int64]
    num_bytes: int  # length of the stream
    arguments: tuple[int, ...]  # what the native routines take


def batch(blocks: native.Blocks, ids: native.Ids, pieces: Pieces | None) -> Batch:
    """Check what is to cross; no pieces means whole blocks. Raises ProtocolError for what lies outside the pool."""
    if blocks.dtype != np.uint8 or blocks.ndim != 2 or not blocks.flags.c_contiguous:
        raise ValueError(
            f"blocks must be contiguous uint8 [num_blocks, block_bytes], not {blocks.dtype} {blocks.shape}"
        )
    size, ids = blocks.shape[1], native.check_ids(ids, len(blocks), "their")
    offsets, lengths, payload, of_pieces = _cut(size, pieces)
    arguments = (blocks.ctypes.data, ids.ctypes.data, len(ids), size, *of_pieces)
    return Batch(blocks, ids, offsets, lengths, len(ids) * payload, arguments)


@lru_cache(maxsize=64)
def _cut(size: int, pieces: Pieces | None) -> tuple[NDArray[np.int64], NDArray[np.int64], int, tuple[int, int, int]]:
    """Offsets and lengths of a block's pieces, their sum, and all as arguments; kept for the next request."""
    offsets, lengths = np.array(pieces if pieces is not None else ((0, size),), dtype=np.int64).reshape(-1, 2).T.copy()
    if not len(offsets) or offsets.min() < 0 or lengths.min() < 1 or (offsets + lengths).max() > size:
        raise ProtocolError(f"a piece lies outside its block of {size} bytes")
    return offsets, lengths, int(lengths.sum()), (offsets.ctypes.data, lengths.ctypes.data, len(offsets))


def send(sock: socket.socket, head: bytes, payload: Batch) -> None:
    """Send `head` and the batch on a blocking socket. Raises OSError."""
    lib = native.library()
    if lib is None:
        _send(sock, head, payload)
        return
    failed = lib.diptych_send(sock.fileno(), head, len(head), *payload.arguments)
    if failed:
        raise OSError(-failed, os.strerror(-failed))


def receive(
    sock: socket.socket,
    wake: int,
    landing: Batch,
    at: int = 0,
    sums: NDArray[np.uint64] | None = None,
    cancel: native.Flag | None = None,
) -> int:
    """Land the batch from its byte `at` on; returns the byte reached.

    That is its end, or less where `cancel` was set, or the descriptor `wake` became readable while nothing came. `sums`
    (uint64 [n]) is filled as whole blocks land. Raises OSError, ConnectionResetError where the stream ended.
    """
    if not landing.blocks.flags.writeable or (sums is not None and sums.shape != (len(landing.ids),)):
        raise ValueError("a batch lands in writable blocks, with a sum for each of them")
    lib = native.library()
    if lib is None:
        return _receive(sock, wake, landing, at, sums, cancel)
    reached: int = lib.diptych_receive(
        sock.fileno(),
        wake,
        *landing.arguments,
        at,
        None if sums is None else sums.ctypes.data,
        None if cancel is None else cancel.ctypes.data,
    )
    if reached < 0:
        raise OSError(-reached, os.strerror(-reached))
    return reached


def _runs(where: Batch, at: int, limit: int) -> Iterator[memoryview]:
    """The memory of the stream's bytes from `at` on, piece by piece, at most `limit` bytes."""
    payload = int(where.lengths.sum())
    skip = at % payload
    for block in where.ids[at // payload :]:
        page = memoryview(where.blocks[block])
        for offset, length in zip(where.offsets.tolist(), where.lengths.tolist(), strict=True):
            if skip >= length:
                skip -= length
                continue
            end = offset + min(length, skip + limit)
            yield page[offset + skip : end]
            limit -= end - offset - skip
            skip = 0
            if limit <= 0:
                return


def _some(where: Batch, at: int, limit: int, count: int) -> list[memoryview]:
    return [run for run, _ in zip(_runs(where, at, limit), range(count), strict=False)]


def _send(sock: socket.socket, head: bytes, payload: Batch) -> None:
    sock.sendall(head)
    at, end = 0, payload.num_bytes
    while at < end:
        at += sock.sendmsg(_some(payload, at, end, _IOVECS))


def _receive(
    sock: socket.socket,
    wake: int,
    landing: Batch,
    at: int,
    sums: NDArray[np.uint64] | None,
    cancel: native.Flag | None,
) -> int:
    size, end = landing.blocks.shape[1], landing.num_bytes
    while at < end and not (cancel is not None and cancel[0]):
        try:
            buffers = _some(landing, at, _LANDING_BYTES, _FALLBACK_IOVECS)
            got = sock.recvmsg_into(buffers, 0, socket.MSG_DONTWAIT)[0]
        except BlockingIOError:
            if wake in readable(sock, wake):
                return at
            continue
        if not got:
            raise ConnectionResetError("the stream ended")
        if sums is not None:
            done = slice(at // size, (at + got) // size)
            sums[done] = native.checksum_blocks(landing.blocks, landing.ids[done])
        at += got
    return at


def readable(sock: socket.socket, wake: int, writing: bool = False) -> set[int]:
    """Wait until something comes (or, for writing, can go), or `wake` is readable; the descriptors that are ready."""
    poll = select.poll()
    poll.register(sock, select.POLLIN | (select.POLLOUT if writing else 0))
    poll.register(wake, select.POLLIN)
    return {fd for fd, _ in poll.poll()}
