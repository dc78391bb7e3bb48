"""Framed messages over a unix or TCP socket: the control plane's one kind of connection.

A frame carries everything one side had to say in one turn of its event loop, so a worker's step is one message however
many requests were in it. Whoever calls says Hello with the cluster's key; the key is compared in constant time, and
nothing else is decoded before. Addresses are "unix:/path" or "tcp:host:port". Not responsible for what is said.
"""

import asyncio
import hmac
import os
import socket
import struct
from collections.abc import Callable, Iterator
from typing import Any

from diptych import journal
from diptych.errors import PeerLost, ProtocolError
from diptych.serve.wire import CODEC, Hello, Welcome

_LENGTH = struct.Struct("<I")
_HELLO_BYTES = 4096  # a stranger may not make us read more than this
_FRAME_BYTES = 8 << 20  # a frame that has this much is sent, and another one begun
_BACKLOG_BYTES = 256 << 20  # unsent bytes at which the other side counts as lost

Heard = Callable[[Any, memoryview], None]


class Channel(asyncio.Protocol):
    """One connection. `say` queues a message; what was queued leaves in one frame at the end of the loop's turn."""

    def __init__(self, on_open: Callable[["Channel"], None] | None = None):
        self.name = ""
        self.heard: Heard = lambda message, attachment: None
        self.lost: Callable[[str], None] = lambda why: None
        self._on_open = on_open
        self._transport: asyncio.Transport | None = None
        self._queue: list[tuple[bytes, bytes]] = []
        self._parts = bytearray()
        self._limit = _HELLO_BYTES
        self._why = "it closed the connection"
        self._loop = asyncio.get_running_loop()

    def say(self, message: Any, attachment: bytes = b"") -> None:
        """Send a message (and its attachment) with this turn's frame."""
        if not self._queue:
            self._loop.call_soon(self.flush)
        self._queue.append((CODEC.encode(message), attachment))

    def flush(self) -> None:
        """Send what is queued now."""
        queue, self._queue = self._queue, []
        if not queue or self._transport is None or self._transport.is_closing():
            return
        for entries in _in_frames(queue):
            self._transport.write(journal.frame(entries))
        if self._transport.get_write_buffer_size() > _BACKLOG_BYTES:
            self.close("it does not read what it is sent")

    def close(self, why: str = "closed by us") -> None:
        """Hang up; `lost` is called with the reason."""
        self._why = why
        if self._transport is not None:
            self.flush()
            self._transport.close()

    def trust(self) -> None:
        """The other side said who it is: frames may be of full size from now on."""
        self._limit = journal.MAX_FRAME_BYTES

    # --- asyncio.Protocol ----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._on_open is not None:
            self._on_open(self)

    def data_received(self, data: bytes) -> None:
        self._parts += data
        try:
            self._frames()
        except ProtocolError as error:
            self.close(f"it broke the protocol: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self.lost(str(exc) if exc else self._why)

    def _frames(self) -> None:
        """Hand on every whole frame that is here."""
        at = 0
        while len(self._parts) - at >= 4:
            (size,) = _LENGTH.unpack_from(self._parts, at)
            if size > self._limit:
                raise ProtocolError(f"a frame of {size} bytes; at most {self._limit} are taken")
            if len(self._parts) - at < 4 + size:
                break
            body = bytes(self._parts[at + 4 : at + 4 + size])
            at += 4 + size
            for message, attachment in journal.entries(body):
                self.heard(CODEC.decode(message), attachment)
        if at:
            del self._parts[:at]


async def listen(address: str, key: str, name: str, accept: Callable[[Channel, Hello], None]) -> asyncio.Server:
    """Serve an address; `accept` gets each caller that knows the key, and sets its `heard` and `lost`."""
    loop = asyncio.get_running_loop()

    def opened(channel: Channel) -> None:
        def first(message: Any, attachment: memoryview) -> None:
            if not isinstance(message, Hello) or not hmac.compare_digest(message.key.encode(), key.encode()):
                raise ProtocolError("it did not say a valid hello")
            channel.name = message.name
            channel.trust()
            channel.say(Welcome(name))
            accept(channel, message)

        channel.heard = first

    kind, where = _split(address)
    if kind == "unix":
        server = await loop.create_unix_server(lambda: Channel(opened), where)
        os.chmod(where, 0o600)
        return server
    host, _, port = where.rpartition(":")
    return await loop.create_server(lambda: Channel(opened), host, int(port))


async def call(address: str, hello: Hello, accept: Callable[[Channel], None], timeout_s: float = 5.0) -> Channel:
    """Connect to an address and introduce oneself; raises PeerLost where nobody answers in time.

    `accept` sets the channel's `heard` and `lost` the moment the other side says welcome.
    """
    loop = asyncio.get_running_loop()
    welcomed: asyncio.Future[None] = loop.create_future()

    channels: list[Channel] = []

    def opened(channel: Channel) -> None:
        channels.append(channel)

        def first(message: Any, attachment: memoryview) -> None:
            if not isinstance(message, Welcome):
                raise ProtocolError("it did not say welcome")
            if welcomed.done():
                raise ProtocolError("it answered too late")
            channel.name = message.name
            channel.trust()
            accept(channel)
            welcomed.set_result(None)

        channel.heard = first
        channel.lost = lambda why: None if welcomed.done() else welcomed.set_exception(PeerLost(f"{address}: {why}"))
        channel.say(hello)

    kind, where = _split(address)
    try:
        async with asyncio.timeout(timeout_s):
            if kind == "unix":
                _, channel = await loop.create_unix_connection(lambda: Channel(opened), where)
            else:
                host, _, port = where.rpartition(":")
                _, channel = await loop.create_connection(lambda: Channel(opened), host, int(port))
            await welcomed
            return channel
    except TimeoutError:
        welcomed.cancel()
        for channel in channels:
            channel.close()
        raise PeerLost(f"{address} did not answer within {timeout_s:g} s") from None
    except OSError as error:
        raise PeerLost(f"{address} cannot be reached: {error}") from error


def _in_frames(queue: list[tuple[bytes, bytes]]) -> Iterator[list[tuple[bytes, bytes]]]:
    """Almost always one frame; more where a thousand prompts go out in one turn."""
    frame: list[tuple[bytes, bytes]] = []
    size = 0
    for entry in queue:
        if frame and size > _FRAME_BYTES:
            yield frame
            frame, size = [], 0
        frame.append(entry)
        size += len(entry[0]) + len(entry[1])
    yield frame


def _split(address: str) -> tuple[str, str]:
    kind, _, where = address.partition(":")
    if kind not in ("unix", "tcp") or not where:
        raise ProtocolError(f"{address!r} is not an address; it should be unix:/path or tcp:host:port")
    return kind, where
