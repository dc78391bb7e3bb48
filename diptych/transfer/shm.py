"""KV transport between the workers of one host: the source's memfd is mapped here, and a read is one memory copy.

Nothing is asked of the source during a read, so a busy or even stopped source does not slow it. That the source is
gone is seen at once, by the end of its connection or of its process; its memory stays mapped until the last copy has
left it.

Not responsible for the copies (`reading.py`), for the owner's side of the socket (`exporter.py`), or for a source that
hangs: that is liveness, the driver's.
"""

import asyncio
import contextlib
import os
import socket
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diptych.errors import ConfigError, PeerLost, ProtocolError
from diptych.transfer import copying, description, handshake, native
from diptych.transfer.description import Description
from diptych.transfer.exporter import Exporter, private_folder
from diptych.transfer.pool import Pool
from diptych.transfer.reading import ThreadedPeer, settle
from diptych.transfer.seam import Readable


class ShmTransport:
    """Implements `seam.Transport`. The pool it registers stays its creator's to close, after `close`.

    runtime_dir: for the socket, made with mode 0700 if missing. One per worker; all calls on one event loop.
    """

    def __init__(self, worker: str, incarnation: int, runtime_dir: str | Path):
        self.worker, self.incarnation = worker, incarnation
        self._folder = private_folder(Path(runtime_dir))
        self._exporter: Exporter | None = None
        self._pool: Pool | None = None
        self._peers: set[ThreadedPeer] = set()

    @property
    def pool(self) -> Pool:
        """The registered pool."""
        if self._pool is None:
            raise ConfigError(f"worker {self.worker} has not registered a pool")
        return self._pool

    def register(self, pool: Pool, readable: Readable | None = None) -> None:
        """Export the pool; once. May compile the copy routines on the first call on this machine.

        Nobody is asked what is readable: whoever is given the descriptor maps all of the pool.
        """
        if self._exporter is not None:
            raise ConfigError(f"worker {self.worker} has registered a pool already")
        native.available()
        self._exporter = Exporter(pool, self.worker, self.incarnation, self._folder)
        self._pool = pool

    def describe(self) -> bytes:
        """What a peer on this host needs to connect."""
        pool = self.pool
        assert self._exporter is not None
        path = self._exporter.path
        return description.encode(Description("shm", self.worker, self.incarnation, pool.layout, pool.num_blocks, path))

    async def connect(self, description: bytes, timeout_s: float = 5.0) -> ThreadedPeer:
        """Connect to the worker so described; raises LayoutMismatch, PeerLost, ProtocolError."""
        said = self._check(description)
        name = f"worker {said.worker} (incarnation {said.incarnation})"
        sock = handshake.new_socket()
        try:
            async with asyncio.timeout(timeout_s):
                source = await _handshake(sock, said, name)
        except TimeoutError as error:
            sock.close()
            raise PeerLost(f"{name} did not answer within {timeout_s:g} s") from error
        except OSError as error:
            sock.close()
            raise PeerLost(f"{name} cannot be reached at {said.path}: {error}") from error
        except BaseException:
            sock.close()
            raise
        return self._meet(name, said.worker, source, sock)

    def _check(self, data: bytes) -> Description:
        said = description.decode(data, "shm")
        self.pool.layout.check(said.layout)
        if not os.path.isabs(said.path) or "\0" in said.path:
            raise ProtocolError(f"worker {said.worker} gave no absolute socket path: {said.path!r}")
        return said

    def _meet(self, name: str, worker: str, source: Pool, sock: socket.socket) -> ThreadedPeer:
        def release() -> None:
            watch.stop()
            source.close()
            self._peers.discard(peer)

        prepare = partial(copying.prepare, source, self.pool)
        peer = ThreadedPeer(name, worker, "shm", source.layout, prepare, release)
        watch = _Watch(sock, peer)
        self._peers.add(peer)
        return peer

    def checksum(self, blocks: NDArray[np.int32]) -> NDArray[np.uint64]:
        """uint64 [n]: checksums of blocks of our own pool."""
        return copying.checksum(self.pool, blocks)

    async def close(self, drain_s: float = 5.0) -> None:
        """Wait at most `drain_s` for reads under way, ours and those of our readers, then drop maps and sockets."""
        peers = tuple(self._peers)
        for peer in peers:
            peer.leave(f"worker {self.worker} is closing")
        readers_gone = self._exporter.close(drain_s) if self._exporter is not None else asyncio.sleep(0)
        await asyncio.gather(settle(peers, drain_s), readers_gone)
        for peer in peers:
            await peer.close()


class _Watch:
    """Notices the end of a source: its goodbye, the end of its connection, or of its process.

    The process is watched beside the socket because a forked child of the source would keep the socket open.
    """

    def __init__(self, sock: socket.socket, peer: ThreadedPeer):
        self._loop = asyncio.get_running_loop()
        self._sock, self._peer = sock, peer
        self._pid = handshake.check_user(sock)
        self._pidfd = _open_process(self._pid)
        self._loop.add_reader(sock, self._heard)
        if self._pidfd is not None:
            self._loop.add_reader(self._pidfd, self._died)

    def stop(self) -> None:
        """Stop watching and hang up."""
        self._loop.remove_reader(self._sock)
        self._sock.close()
        if self._pidfd is not None:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = None

    def _heard(self) -> None:
        try:
            message = self._sock.recv(handshake.MAX_MESSAGE)
        except BlockingIOError:
            return
        except OSError:
            message = b""
        if message == handshake.BYE:
            self._peer.leave("it is closing")
        elif message:
            self._peer.lose("it said something that is not in the protocol")
        else:
            self._peer.lose("it closed the connection or died")

    def _died(self) -> None:
        self._peer.lose(f"its process {self._pid} died")


def _open_process(pid: int) -> int | None:
    """A pollable descriptor of a process, or None where there is no such thing (pid 0: another pid namespace)."""
    if pid <= 0:
        return None
    with contextlib.suppress(OSError):
        return os.pidfd_open(pid)
    return None


async def _handshake(sock: socket.socket, said: Description, name: str) -> Pool:
    """Connect, introduce ourselves, and map what we are given."""
    await _connect(sock, said.path)
    handshake.check_user(sock)
    sock.send(handshake.hello(said.layout, said.incarnation))
    await _readable(sock)
    fd = handshake.receive_answer(sock, name, said.num_blocks)
    try:
        return Pool.attach(fd, said.layout, said.num_blocks)
    finally:
        os.close(fd)


async def _connect(sock: socket.socket, path: str) -> None:
    """A unix connect does not wait: it works, fails, or (a full backlog) wants to be tried again."""
    while True:
        try:
            sock.connect(path)
            return
        except BlockingIOError:
            await asyncio.sleep(0.01)


async def _readable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_reader(sock, lambda: None if ready.done() else ready.set_result(None))
    try:
        await ready
    finally:
        loop.remove_reader(sock)
