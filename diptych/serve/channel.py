"""Framed messages over a unix or TCP socket: the control plane's one kind of connection.

A frame carries everything one side had to say in one turn of its event loop, so a worker's step is one message however
many requests were in it. Each side first proves to the other that it knows the cluster's key, over nonces of both,
within a deadline and 4 KiB; nothing else is decoded before. Addresses are "unix:/path" or "tcp:host:port".

Over TCP a host that has vanished without a word is noticed within `SILENCE_S`. Not responsible for what is said, nor
for keeping it secret: traffic is not encrypted.
"""

import asyncio
import hmac
import os
import re
import secrets
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from diptych import journal
from diptych.errors import PeerLost, ProtocolError
from diptych.serve.wire import CODEC, NONCE_BYTES, Challenge, Hello, Welcome, called_proof, caller_proof

_LENGTH = struct.Struct("<I")
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid
HANDSHAKE_S = 5.0  # a stranger who has not proved anything by then is hung up on
SILENCE_S = 15  # TCP: idle for a third of it, then asked for an answer until it is over
_MAX_STRANGERS = 256  # connections without a proof at a time
_HUNG_UP = "it closed the connection"
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_HELLO_BYTES = 4096  # a stranger may not make us read more than this
_FRAME_BYTES = 8 << 20  # a frame that has this much is sent, and another one begun
_BACKLOG_BYTES = 256 << 20  # unsent bytes at which the other side counts as lost

Heard = Callable[[Any, bytes], None]


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
        self.why = _HUNG_UP  # what `lost` is told where nothing worse is known
        self._loop = asyncio.get_running_loop()
        self._patience: asyncio.TimerHandle | None = None

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
            self.drop("it does not read what it is sent")

    def close(self, why: str = "closed by us") -> None:
        """Hang up; `lost` is called with the reason."""
        self.why = why
        if self._transport is not None:
            self.flush()
            self._transport.close()

    def drop(self, why: str) -> None:
        """Hang up on somebody who may never read what was sent: nothing is waited for."""
        self.why = why
        if self._transport is not None:
            self._transport.abort()

    def trust(self) -> None:
        """The other side proved who it is: frames may be of full size from now on, and take their time."""
        self._limit = journal.MAX_FRAME_BYTES
        if self._patience is not None:
            self._patience.cancel()

    @property
    def is_open(self) -> bool:
        """Neither side has hung up."""
        return self._transport is not None and not self._transport.is_closing()

    @property
    def pid(self) -> int:
        """The process at the other end of a unix socket, as the kernel knows it; 0 where it is on another host."""
        sock = self._transport.get_extra_info("socket") if self._transport is not None else None
        if sock is None or sock.family != socket.AF_UNIX:
            return 0
        return int(_CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))[0])

    @property
    def here(self) -> str:
        """The host part of our own end of a TCP connection; "" of a unix socket."""
        name = self._transport.get_extra_info("sockname") if self._transport is not None else ""
        return str(name[0]) if isinstance(name, tuple) else ""

    # --- asyncio.Protocol ----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family != socket.AF_UNIX:
            _set_up(sock)
        self._patience = self._loop.call_later(
            HANDSHAKE_S, self.close, "it did not prove in time that it knows the key"
        )
        if self._on_open is not None:
            self._on_open(self)

    def data_received(self, data: bytes) -> None:
        self._parts += data
        try:
            self._frames()
        except ProtocolError as error:
            self.drop(f"it broke the protocol: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._patience is not None:
            self._patience.cancel()
        self.lost(str(exc) if exc else self.why)

    def _frames(self) -> None:
        """Hand on every whole frame that is here."""
        at = 0
        while len(self._parts) - at >= 4 and self.is_open:
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


async def listen(
    address: str | socket.socket, key: str, name: str, accept: Callable[[Channel, Hello], None]
) -> asyncio.Server:
    """Serve an address, or a TCP socket that listens; `accept` gets each caller that knows the key.

    It sets the channel's `heard` and `lost`.
    """
    loop = asyncio.get_running_loop()
    strangers: set[Channel] = set()

    def opened(channel: Channel) -> None:
        challenge = secrets.token_bytes(NONCE_BYTES)

        def first(message: Any, attachment: bytes) -> None:
            if not isinstance(message, Hello) or not _NAME.fullmatch(message.name):
                raise ProtocolError("it did not say a valid hello")
            if not hmac.compare_digest(message.proof, caller_proof(key, challenge, message)):
                raise ProtocolError("it does not know the key")
            strangers.discard(channel)
            channel.name = message.name
            channel.trust()
            channel.lost = lambda why: None
            channel.say(Welcome(name, called_proof(key, challenge, message, name)))
            accept(channel, message)

        channel.heard = first
        channel.lost = lambda why: strangers.discard(channel)
        strangers.add(channel)
        if len(strangers) > _MAX_STRANGERS:
            channel.close("too many strangers")
        channel.say(Challenge(challenge))

    if isinstance(address, socket.socket):
        return await loop.create_server(lambda: Channel(opened), sock=address)
    kind, where = _split(address)
    if kind == "unix":
        server = await loop.create_unix_server(lambda: Channel(opened), where)
        os.chmod(where, 0o600)
        return server
    return await loop.create_server(lambda: Channel(opened), *split_host(where))


async def call(
    address: str, key: str, hello: Hello, accept: Callable[[Channel], None], timeout_s: float = 5.0, expect: str = ""
) -> Channel:
    """Connect to an address and introduce oneself; raises PeerLost where nobody answers in time.

    `accept` sets the channel's `heard` and `lost` the moment the other side has proved, in its welcome, that it knows
    the key (and is called `expect`, where that is given).
    """
    loop = asyncio.get_running_loop()
    welcomed: asyncio.Future[None] = loop.create_future()
    channels: list[Channel] = []

    def opened(channel: Channel) -> None:
        channels.append(channel)
        _introduce(channel, key, hello, accept, welcomed, expect)
        channel.lost = lambda why: None if welcomed.done() else welcomed.set_exception(PeerLost(f"{address}: {why}"))

    kind, where = _split(address)
    try:
        async with asyncio.timeout(timeout_s):
            if kind == "unix":
                _, channel = await loop.create_unix_connection(lambda: Channel(opened), where)
            else:
                _, channel = await loop.create_connection(lambda: Channel(opened), *split_host(where))
            await welcomed
            return channel
    except TimeoutError:
        welcomed.cancel()
        for channel in channels:
            channel.close()
        raise PeerLost(f"{address} did not answer within {timeout_s:g} s") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in a path, a name that no host can have
        raise PeerLost(f"{address} cannot be reached: {error}") from error


def _introduce(
    channel: Channel,
    key: str,
    hello: Hello,
    accept: Callable[[Channel], None],
    welcomed: "asyncio.Future[None]",
    expect: str,
) -> None:
    """The caller's side of the handshake: answer the challenge, and check the welcome."""

    def challenged(message: Any, attachment: bytes) -> None:
        if not isinstance(message, Challenge) or len(message.nonce) != NONCE_BYTES:
            raise ProtocolError("it did not say a challenge")
        mine = replace(hello, nonce=secrets.token_bytes(NONCE_BYTES))
        wanted = partial(called_proof, key, message.nonce, mine)

        def answered(message: Any, attachment: bytes) -> None:
            if not isinstance(message, Welcome) or not hmac.compare_digest(message.proof, wanted(message.name)):
                raise ProtocolError("it did not prove in a welcome that it knows the key")
            if expect and message.name != expect:
                raise ProtocolError(f"it is {message.name}, not {expect}")
            if welcomed.done():
                raise ProtocolError("it answered too late")
            channel.name, channel.why = message.name, _HUNG_UP
            channel.trust()
            accept(channel)
            welcomed.set_result(None)

        channel.heard = answered
        channel.why = "it hung up on our hello; do both sides have the same key?"
        channel.say(replace(mine, proof=caller_proof(key, message.nonce, mine)))

    channel.heard = challenged


def _set_up(sock: socket.socket) -> None:
    """No waiting for more to send; and a connection whose other end is silent ends."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, SILENCE_S // 3)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 2)
    # Counts for data that is not acknowledged, and for keep-alive questions that are not answered.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * (SILENCE_S - SILENCE_S // 3))


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


def split_host(where: str) -> tuple[str, int]:
    """Host and port of "host:port" or "[::1]:port"; raises ProtocolError."""
    host, _, port = where.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ProtocolError(f"{where!r} is not host:port")
    return host.removeprefix("[").removesuffix("]"), int(port)


def join_host(host: str, port: int) -> str:
    """The other way round."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
