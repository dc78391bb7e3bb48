"""The handshake over real sockets: who knows the key gets in, and nobody else; and what TCP connections are set to."""

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from diptych import journal
from diptych.errors import PeerLost, ProtocolError
from diptych.serve import channel as module
from diptych.serve.channel import Channel, call, join_host, listen, split_host
from diptych.serve.wire import CODEC, NONCE_BYTES, Ask, Challenge, Hello, Welcome, called_proof, caller_proof

KEY = "a key that nobody guesses"
ME = Hello("peer", "me", 3)


@dataclass
class Server:
    """What a listening side met and heard."""

    port: int = 0
    met: list[Hello] = field(default_factory=list)
    channels: list[Channel] = field(default_factory=list)
    heard: list[Any] = field(default_factory=list)


@contextlib.asynccontextmanager
async def serving() -> AsyncIterator[Server]:
    made = Server()

    def accept(channel: Channel, hello: Hello) -> None:
        made.met.append(hello)
        made.channels.append(channel)
        channel.heard = lambda message, attachment: made.heard.append((message, bytes(attachment)))

    server = await listen("tcp:127.0.0.1:0", KEY, "you", accept)
    made.port = server.sockets[0].getsockname()[1]
    try:
        yield made
    finally:
        server.close()


class Stranger:
    """A raw connection that says what it likes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.reader, self.writer = reader, writer

    async def hears(self) -> Any:
        """The next message, or None where it is hung up on."""
        try:
            (size,) = struct.unpack("<I", await self.reader.readexactly(4))
            ((message, _),) = journal.entries(await self.reader.readexactly(size))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        return CODEC.decode(message)

    def says(self, *messages: Any) -> None:
        self.writer.write(journal.frame((CODEC.encode(message), b"") for message in messages))


@contextlib.asynccontextmanager
async def stranger(port: int) -> AsyncIterator[tuple[Stranger, bytes]]:
    """Connected, and challenged."""
    made = Stranger(*await asyncio.open_connection("127.0.0.1", port))
    challenge = await made.hears()
    assert isinstance(challenge, Challenge)
    yield made, challenge.nonce
    made.writer.close()


def proved(nonce: bytes, hello: Hello = ME, key: str = KEY) -> Hello:
    hello = replace(hello, nonce=b"n" * NONCE_BYTES)
    return replace(hello, proof=caller_proof(key, nonce, hello))


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not true():
            await asyncio.sleep(0.005)


def test_both_sides_that_know_the_key_talk() -> None:
    async def run() -> None:
        async with serving() as server:
            said: list[Any] = []

            def met(channel: Channel) -> None:
                channel.heard = lambda message, attachment: said.append(message)

            channel = await call(f"tcp:127.0.0.1:{server.port}", KEY, ME, met, expect="you")
            channel.say(Ask(1), b"with this")
            await until(lambda: bool(server.heard))
            server.channels[0].say(Ask(2))
            await until(lambda: bool(said))
            assert server.heard == [(Ask(1), b"with this")] and said == [Ask(2)]
            assert (server.met[0].name, server.met[0].incarnation, channel.name) == ("me", 3, "you")
            assert KEY not in repr(server.met), "the key itself never travels"
            channel.close()

    asyncio.run(run())


def test_forged_replayed_altered_and_early_words_are_hung_up_on() -> None:
    async def run() -> None:
        async with serving() as server:
            async with stranger(server.port) as (_, old):
                pass
            async with stranger(server.port) as (good, nonce):
                true = proved(nonce)
                good.says(true)
                assert isinstance(await good.hears(), Welcome)
            wrong: list[Callable[[bytes], Any]] = [
                lambda nonce: proved(nonce, key=KEY + "!"),
                lambda nonce: proved(old),  # a proof made for another connection
                lambda nonce: true,  # and one that was good once
                lambda nonce: replace(proved(nonce), kind="worker"),
                lambda nonce: replace(proved(nonce), name="you"),
                lambda nonce: replace(proved(nonce), incarnation=4),
                lambda nonce: replace(proved(nonce), nonce=b""),
                lambda nonce: replace(proved(nonce), proof=b""),
                lambda nonce: replace(proved(nonce), proof=called_proof(KEY, nonce, proved(nonce), "me")),
                lambda nonce: proved(nonce, replace(ME, name="../me")),
                lambda nonce: Ask(1),
                lambda nonce: Challenge(nonce),
            ]
            for word in wrong:
                async with stranger(server.port) as (bad, nonce):
                    bad.says(word(nonce), Ask(9))
                    assert await bad.hears() is None, word(nonce)
            assert len(server.met) == 1 and not server.heard

    asyncio.run(run())


@pytest.mark.parametrize(
    "data", [struct.pack("<I", 4097), struct.pack("<I", 1 << 31) + b"x", b"GET / HTTP/1.1\r\n\r\n"]
)
def test_who_says_more_than_a_hello_is_hung_up_on(data: bytes) -> None:
    async def run() -> None:
        async with serving() as server, stranger(server.port) as (bad, _):
            bad.writer.write(data)
            assert await bad.hears() is None

    asyncio.run(run())


def test_who_says_half_a_hello_or_nothing_is_hung_up_on_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HANDSHAKE_S", 0.1)

    async def run() -> None:
        async with serving() as server:
            async with stranger(server.port) as (silent, _):
                assert await silent.hears() is None
            async with stranger(server.port) as (slow, nonce):
                slow.writer.write(journal.frame([(CODEC.encode(proved(nonce)), b"")])[:-1])
                assert await slow.hears() is None
            async with stranger(server.port) as (good, nonce):
                good.says(proved(nonce))
                assert isinstance(await good.hears(), Welcome)
                await asyncio.sleep(0.2)
                good.says(Ask(1))
                await until(lambda: bool(server.heard))  # once known, one may take one's time

    asyncio.run(run())


def test_a_crowd_of_strangers_is_kept_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_STRANGERS", 3)

    async def run() -> None:
        async with serving() as server, contextlib.AsyncExitStack() as stack:
            for _ in range(3):
                await stack.enter_async_context(stranger(server.port))
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            assert await reader.read() == b"", "one too many"
            writer.close()

    asyncio.run(run())


def test_a_caller_does_not_believe_just_anybody() -> None:
    """Whoever answers has to prove that it knows the key, too, and be who was called."""

    async def answered_by(answer: Callable[[Hello], Any]) -> str:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            other = Stranger(reader, writer)
            other.says(Challenge(nonce))
            hello = await other.hears()
            other.says(answer(hello))
            await reader.read()
            writer.close()

        nonce = b"c" * NONCE_BYTES
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        met: list[Channel] = []
        with pytest.raises(PeerLost) as error:
            await call(f"tcp:127.0.0.1:{port}", KEY, ME, met.append, 5.0, expect="you")
        assert not met
        server.close()
        return str(error.value)

    async def run() -> None:
        nonce = b"c" * NONCE_BYTES
        assert "did not prove" in await answered_by(lambda hello: Welcome("you", b""))
        assert "did not prove" in await answered_by(lambda hello: Welcome("you", hello.proof))
        assert "did not prove" in await answered_by(
            lambda hello: Welcome("you", called_proof("another key", nonce, hello, "you"))
        )
        assert "it is them, not you" in await answered_by(
            lambda hello: Welcome("them", called_proof(KEY, nonce, hello, "them"))
        )

    asyncio.run(run())


def test_who_has_another_key_hears_what_may_be_wrong() -> None:
    async def run() -> None:
        async with serving() as server:
            with pytest.raises(PeerLost, match="same key"):
                await call(f"tcp:127.0.0.1:{server.port}", KEY + "!", ME, lambda channel: None)
        with pytest.raises(PeerLost, match="cannot be reached"):
            await call(f"tcp:127.0.0.1:{server.port}", KEY, ME, lambda channel: None)

    asyncio.run(run())


def test_a_silent_host_is_noticed_on_both_sides() -> None:
    """The kernel asks an idle peer for an answer, and gives up on data that nobody acknowledges."""

    async def run() -> None:
        async with serving() as server:
            channel = await call(f"tcp:127.0.0.1:{server.port}", KEY, ME, lambda channel: None)
            for end in (channel, server.channels[0]):
                assert end._transport is not None
                sock = end._transport.get_extra_info("socket")
                assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
                idle = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
                patience = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
                assert idle + patience / 1000 == module.SILENCE_S
            channel.close()

    asyncio.run(run())


def test_unix_sockets_shake_hands_alike(tmp_path: Path) -> None:
    async def run() -> None:
        address = f"unix:{tmp_path}/socket"
        server = await listen(address, KEY, "you", lambda channel, hello: None)
        assert (tmp_path / "socket").stat().st_mode & 0o777 == 0o600
        (await call(address, KEY, ME, lambda channel: None)).close()
        with pytest.raises(PeerLost):
            await call(address, "another key", ME, lambda channel: None)
        server.close()

    asyncio.run(run())


def test_addresses() -> None:
    assert split_host("10.0.0.1:7000") == ("10.0.0.1", 7000)
    assert split_host("[fe80::1]:7000") == ("fe80::1", 7000) and join_host("fe80::1", 7000) == "[fe80::1]:7000"
    for wrong in ("", "host", "host:", ":7000", "host:x", "host:70000", "host:²"):
        with pytest.raises(ProtocolError):
            split_host(wrong)


def test_the_kernel_says_who_is_at_the_other_end_of_a_unix_socket(tmp_path: Path) -> None:
    async def run() -> None:
        ends: list[Channel] = []
        lost: list[str] = []
        server = await listen(f"unix:{tmp_path}/sock", KEY, "you", lambda channel, hello: ends.append(channel))
        near = await call(f"unix:{tmp_path}/sock", KEY, ME, ends.append)
        assert [end.pid for end in ends] == [os.getpid()] * 2
        near.lost = lost.append
        near.drop("it hangs")
        async with asyncio.timeout(5):
            while not lost:
                await asyncio.sleep(0.001)
        assert lost == ["it hangs"] and near.pid == 0
        server.close()

    asyncio.run(run())


def test_of_who_comes_over_tcp_no_process_is_known() -> None:
    async def run() -> None:
        async with serving() as server:
            far = await call(f"tcp:127.0.0.1:{server.port}", KEY, ME, lambda channel: None)
            assert far.pid == server.channels[0].pid == 0
            far.close()

    asyncio.run(run())
