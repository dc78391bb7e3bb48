"""Accepts connections on the worker's event loop, and looks away for a while where descriptors have run out.

Not responsible for what a connection is (`exporter.py`, `serving.py`), nor for making the listening socket.
"""

import asyncio
import logging
import socket
from collections.abc import Callable

log = logging.getLogger(__name__)

PAUSE_S = 1.0  # before accepting again when descriptors have run out


class Listener:
    """Hands every connection to `accepted`, non-blocking. Must be made and closed on one event loop."""

    def __init__(self, sock: socket.socket, accepted: Callable[[socket.socket], None]):
        self._loop = asyncio.get_running_loop()
        self._sock, self._accepted = sock, accepted
        self._loop.add_reader(sock, self._accept)

    def close(self) -> None:
        """Stop listening. Idempotent."""
        if not self.closed:
            self._loop.remove_reader(self._sock)
            self._sock.close()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._sock.fileno() < 0

    def _accept(self) -> None:
        try:
            connection, _ = self._sock.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:  # out of descriptors: the listener stays readable, so look away for a while
            log.warning("cannot accept a KV reader: %s", error)
            self._loop.remove_reader(self._sock)
            self._loop.call_later(PAUSE_S, self._resume)
            return
        connection.setblocking(False)
        self._accepted(connection)

    def _resume(self) -> None:
        if not self.closed:
            self._loop.add_reader(self._sock, self._accept)
