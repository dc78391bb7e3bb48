"""Serves the blocks of a pool to authenticated readers over TCP. The pool is only read: nothing from a socket lands.

Strangers are met on the worker's event loop, with a deadline. A reader then has two connections. One asks and is
answered by a thread of its own: a request names blocks by index, the reply leaves the pool by `sendmsg`, and a request
that is not in the protocol ends that connection, nothing else. One whose permit is not good for its blocks is refused,
and the connection goes on: an offer may end while a request is on its way. The other is silent; it tells each side
that the other is gone, or going, whatever the first is busy with.

A permit is judged when its request comes; what was granted is sent, though the offer may end meanwhile. Not responsible
for who may read what when (`readable` knows), nor for the reader's side (`stream.py`).
"""

import asyncio
import contextlib
import logging
import socket
import threading
import time

import numpy as np
from numpy.typing import NDArray

from diptych.errors import DiptychError, ProtocolError
from diptych.transfer import codec, frames
from diptych.transfer.codec import Staging
from diptych.transfer.introduction import Purpose, meet
from diptych.transfer.listening import Listener
from diptych.transfer.native import int8, sockets
from diptych.transfer.pool import Pool
from diptych.transfer.seam import Readable

log = logging.getLogger(__name__)

HELLO_S = 5.0  # for a caller to introduce itself
MAX_STRANGERS = 64  # callers that have not; with one more, the oldest is shown out
VANISHED_S = 15  # after which a host that is off, or a reader that takes nothing, counts as gone


class BlockServer:
    """Serves `pool` on a listening socket, which it closes. Must be made and closed on one event loop.

    readable: asked about each request, on its reader's thread; None grants all.
    """

    def __init__(
        self,
        pool: Pool,
        worker: str,
        incarnation: int,
        key: str,
        listener: socket.socket,
        readable: Readable | None = None,
    ):
        self._pool, self._worker, self._incarnation, self._key = pool, worker, incarnation, key
        self._readable = readable
        self._loop = asyncio.get_running_loop()
        self._strangers: dict[socket.socket, asyncio.Task[None]] = {}  # oldest first
        self._watchers: set[socket.socket] = set()
        self._readers: set[socket.socket] = set()  # each has a thread
        self._nobody = asyncio.Event()
        self._nobody.set()
        self._listener = Listener(listener, self._accept)

    @property
    def num_readers(self) -> int:
        """Connections that ask for blocks."""
        return len(self._readers)

    @property
    def num_strangers(self) -> int:
        """Callers that have not introduced themselves."""
        return len(self._strangers)

    async def close(self, drain_s: float) -> None:
        """Stop listening, tell readers to finish, hang up when they have, or after `drain_s`."""
        self._listener.close()
        for task in tuple(self._strangers.values()):
            task.cancel()
        for sock in tuple(self._watchers):
            try:
                sock.send(frames.GOODBYE)
            except OSError:
                self._forget(sock)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._nobody.wait(), drain_s)
        for sock in tuple(self._watchers):
            self._forget(sock)
        for sock in self._readers:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)  # ends what its thread waits for; the thread says when it left
        await self._nobody.wait()

    # --- strangers -----------------------------------------------------------------------------------------------

    def _accept(self, sock: socket.socket) -> None:
        if len(self._strangers) >= MAX_STRANGERS:
            next(iter(self._strangers.values())).cancel()
        self._nobody.clear()
        self._strangers[sock] = task = self._loop.create_task(self._meet(sock))
        task.add_done_callback(lambda _: self._met(sock))

    async def _meet(self, sock: socket.socket) -> None:
        try:
            set_up(sock)
            async with asyncio.timeout(HELLO_S):
                expected = self._key, self._worker, self._incarnation, self._pool.layout
                purpose = await meet(sock, *expected, self._pool.num_blocks)
        except (TimeoutError, DiptychError, OSError) as error:
            log.warning("refused a KV reader: %s", error or f"it did not introduce itself within {HELLO_S:g} s")
            return
        (self._watch if purpose is Purpose.WATCH else self._serve)(sock)

    def _met(self, sock: socket.socket) -> None:
        """A stranger is one of us now, or out."""
        self._strangers.pop(sock)
        if sock not in self._watchers and sock not in self._readers:
            self._forget(sock)

    def _forget(self, sock: socket.socket) -> None:
        if sock in self._watchers:
            self._loop.remove_reader(sock)
        self._watchers.discard(sock)
        self._readers.discard(sock)
        sock.close()
        if not self._watchers and not self._readers and not self._strangers:
            self._nobody.set()

    # --- readers -------------------------------------------------------------------------------------------------

    def _watch(self, sock: socket.socket) -> None:
        """Whatever is heard on this connection is its end: readers have nothing to say there."""
        self._watchers.add(sock)
        self._loop.add_reader(sock, self._forget, sock)

    def _serve(self, sock: socket.socket) -> None:
        sock.setblocking(True)
        self._readers.add(sock)
        threading.Thread(target=self._work, args=(sock,), name=f"kv-serve-{self._worker}", daemon=True).start()

    def _work(self, sock: socket.socket) -> None:
        """A reader's thread. Only the loop closes the socket: its number must not be another's while we use it."""
        staging = Staging(codec.rows_of(self._pool.layout))
        try:
            while answer(sock, self._pool, staging, self._readable):
                pass
        except OSError as error:
            log.info("a KV reader is gone: %s", error)
        except Exception as error:  # one connection's end, and never the worker's
            log.warning("hung up on a KV reader: %s", error, exc_info=not isinstance(error, DiptychError))
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to be told
            self._loop.call_soon_threadsafe(self._forget, sock)


def answer(sock: socket.socket, pool: Pool, staging: Staging, readable: Readable | None = None) -> bool:
    """Answer one request on a blocking socket; False where the reader hung up between two.

    Raises OSError, and ProtocolError for what is not a request, or is for what is not there.
    """
    head = _take(sock, frames.REQUEST_BYTES)
    if not head:
        return False
    request = frames.decode_request(head)
    ids = np.frombuffer(_take(sock, 4 * request.num_blocks), dtype="<i4")
    if len(ids) != request.num_blocks:
        raise ProtocolError("a request ended before its block ids")
    if readable is not None and not readable(request.permit, ids.tolist()):
        log.info("refused a KV reader %d blocks: they are not offered by the permit it has", len(ids))
        sock.sendall(frames.encode_refusal(request.number, request.num_blocks))
        return True
    whole = request.layers is None and request.heads is None
    if request.codec == "int8":
        if not whole:
            raise ProtocolError("a request for parts of blocks as int8: only whole ones can be encoded")
        _send_encoded(sock, request, pool, ids, staging)
        return True
    pieces = None if whole else pool.layout.pieces(request.layers, request.heads)
    payload = sockets.batch(pool.view, ids, pieces)
    sockets.send(sock, frames.encode_reply(request.number, request.num_blocks, payload.num_bytes), payload)
    return True


def _send_encoded(
    sock: socket.socket, request: frames.Request, pool: Pool, ids: NDArray[np.int32], staging: Staging
) -> None:
    """Encode and send, as much at a time as the staging memory holds; a reader that asks for a batch gets one."""
    shape = staging.shape
    if shape is None:
        raise ProtocolError("a request for int8, and these blocks are not rows of floats")
    num_bytes, step = request.num_blocks * shape.encoded_bytes, staging.room
    for first in range(0, len(ids), step):
        part = ids[first : first + step]
        began = time.perf_counter()
        encoded = staging.take(len(part))
        int8.encode(pool.view, part, shape, encoded)
        spent_s = (time.perf_counter() - began) * len(ids) / len(part)
        head = frames.encode_reply(request.number, request.num_blocks, num_bytes, spent_s) if first == 0 else b""
        sockets.send(sock, head, sockets.batch(encoded, np.arange(len(part), dtype=np.int32), None))


def _take(sock: socket.socket, num_bytes: int) -> bytes:
    """So many bytes; none where the stream ended before the first. Raises ProtocolError for an end in between."""
    got = sock.recv(num_bytes, socket.MSG_WAITALL)
    while got and len(got) < num_bytes:  # a signal came in between, or the end
        part = sock.recv(num_bytes - len(got), socket.MSG_WAITALL)
        if not part:
            raise ProtocolError(f"a request ended after {len(got)} of {num_bytes} bytes")
        got += part
    return got


def set_up(sock: socket.socket) -> None:
    """No waiting for small packets, and an end to waiting for a host that is off.

    An idle connection is probed after a third of `VANISHED_S`; one with bytes that nobody takes is given up after it.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_KEEPIDLE, VANISHED_S // 3),
        (socket.TCP_KEEPINTVL, VANISHED_S // 5),
        (socket.TCP_KEEPCNT, 3),
        (socket.TCP_USER_TIMEOUT, VANISHED_S * 1000),
    ):
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
