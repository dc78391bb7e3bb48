"""Hands a pool's memfd to other workers of this host, over a unix socket of its own.

Runs by callbacks on the worker's event loop; nothing here blocks or takes more than microseconds. The connections
stay open for as long as the readers want: their end is how each side learns that the other is gone.

Not responsible for reading (`shm.py`): once a reader holds the descriptor, this process is not asked again.
"""

import asyncio
import contextlib
import logging
import os
import secrets
import socket
from pathlib import Path

from diptych.errors import ConfigError, ProtocolError
from diptych.transfer import handshake
from diptych.transfer.handshake import Code
from diptych.transfer.listening import Listener
from diptych.transfer.pool import Pool

log = logging.getLogger(__name__)

HELLO_S = 5.0  # for a connected reader to introduce itself
_MAX_PATH = 107  # sun_path without its final NUL


class Exporter:
    """Listens in `folder` for readers of `pool`. Must be made, used and closed on one event loop."""

    def __init__(self, pool: Pool, worker: str, incarnation: int, folder: Path):
        self._pool, self._incarnation = pool, incarnation
        self._loop = asyncio.get_running_loop()
        self._timers: dict[socket.socket, asyncio.TimerHandle] = {}  # readers that have not said hello
        self._readers: set[socket.socket] = set()
        self._nobody = asyncio.Event()
        self._nobody.set()
        self._closing = False
        # The random part: a crashed predecessor of the same name may have left its socket file behind.
        self.path = str(folder / f"{worker}-{incarnation}-{secrets.token_hex(4)}.kv")
        self._listener = Listener(_listen(self.path), self._accept)

    @property
    def num_readers(self) -> int:
        """Connected readers."""
        return len(self._readers)

    async def close(self, drain_s: float) -> None:
        """Stop listening, tell readers to finish, hang up when they have, or after `drain_s`."""
        self._closing = True
        if not self._listener.closed:
            self._listener.close()
            with contextlib.suppress(OSError):
                os.unlink(self.path)
        for reader in tuple(self._readers):
            if reader in self._timers:
                self._drop(reader)
            else:
                self._say_bye(reader)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._nobody.wait(), drain_s)
        for reader in tuple(self._readers):
            self._drop(reader)

    def _accept(self, reader: socket.socket) -> None:
        try:
            handshake.check_user(reader)
        except (ProtocolError, OSError) as error:
            log.warning("refused a KV reader: %s", error)
            reader.close()
            return
        self._readers.add(reader)
        self._nobody.clear()
        self._timers[reader] = self._loop.call_later(HELLO_S, self._drop, reader)
        self._loop.add_reader(reader, self._hear, reader)

    def _hear(self, reader: socket.socket) -> None:
        try:
            message = reader.recv(handshake.MAX_MESSAGE)
        except BlockingIOError:
            return
        except OSError:
            message = b""
        timer = self._timers.pop(reader, None)
        if timer is not None:
            timer.cancel()
        if not message or timer is None or not self._answer(reader, message):  # readers speak once
            self._drop(reader)

    def _answer(self, reader: socket.socket, message: bytes) -> bool:
        """Whether the reader was given the pool."""
        code = handshake.judge(message, self._pool.layout, self._incarnation)
        if self._closing or self._pool.closed:
            code = Code.CLOSING
        try:
            handshake.send_answer(reader, code, self._pool.num_blocks, self._pool.fd)
        except OSError:
            return False
        return code is Code.OK

    def _say_bye(self, reader: socket.socket) -> None:
        try:
            reader.send(handshake.BYE)
        except OSError:
            self._drop(reader)

    def _drop(self, reader: socket.socket) -> None:
        timer = self._timers.pop(reader, None)
        if timer is not None:
            timer.cancel()
        if reader in self._readers:
            self._readers.discard(reader)
            self._loop.remove_reader(reader)
            reader.close()
        if not self._readers:
            self._nobody.set()


def _listen(path: str) -> socket.socket:
    if len(os.fsencode(path)) > _MAX_PATH:
        raise ConfigError(f"socket path {path!r} is longer than {_MAX_PATH} bytes; choose a shorter runtime directory")
    listener = handshake.new_socket()
    try:
        listener.bind(path)
        os.chmod(path, 0o600)
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen at {path!r}: {error}") from error
    return listener


def private_folder(folder: Path) -> Path:
    """`folder`, made for this user alone if missing. ConfigError where others could replace what lies in it."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        stat = folder.stat()
    except OSError as error:
        raise ConfigError(f"cannot use runtime directory {folder}: {error}") from error
    if stat.st_uid != os.geteuid() or stat.st_mode & 0o022:
        raise ConfigError(f"runtime directory {folder} can be changed by other users; make it ours alone (chmod 700)")
    return folder.absolute()
