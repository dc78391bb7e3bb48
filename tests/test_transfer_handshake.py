"""What two workers say to each other before memory changes hands, and what becomes of those who lie.

Covers `description.py`, `handshake.py` and `exporter.py`.
"""

import asyncio
import contextlib
import os
import socket
import tempfile
import threading
from collections.abc import AsyncIterator, Awaitable, Iterator
from pathlib import Path

import msgspec
import pytest

from diptych.errors import ConfigError, LayoutMismatch, PeerLost, ProtocolError, TransferError
from diptych.transfer import exporter, handshake, shm
from diptych.transfer.description import MAX_BYTES, Description, decode, encode
from diptych.transfer.handshake import Code
from diptych.transfer.layout import Layout
from diptych.transfer.pool import Pool
from diptych.transfer.shm import ShmTransport

LAYOUT = Layout.uniform(layers=2, kv_heads=2, head_dim=16, block_size=16, dtype="float32", model="m")
NUM_BLOCKS = 64


@pytest.fixture
def folder() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="kv") as path:
        yield f"{path}/run"


@contextlib.asynccontextmanager
async def worker(folder: str, name: str = "decode-0") -> AsyncIterator[tuple[ShmTransport, Pool]]:
    pool, transport = Pool(LAYOUT, NUM_BLOCKS), ShmTransport(name, 1, folder)
    transport.register(pool)
    try:
        yield transport, pool
    finally:
        await transport.close(0.2)
        pool.close()


def run(story: Awaitable[None]) -> None:
    async def main() -> None:
        async with asyncio.timeout(30):
            await story

    asyncio.run(main())


# --- what peers say is checked ----------------------------------------------------------------------------------


def test_another_incarnation_layout_or_size_behind_the_socket_is_refused(folder: str) -> None:
    async def story() -> None:
        async with worker(folder, "prefill-0") as (prefill, _), worker(folder) as (decode, _):
            said = msgspec.msgpack.decode(prefill.describe(), type=Description)
            with pytest.raises(PeerLost, match="replaced by another incarnation"):
                await decode.connect(encode(msgspec.structs.replace(said, incarnation=2)))
            with pytest.raises(ProtocolError, match="described 63 blocks but has 64"):
                await decode.connect(encode(msgspec.structs.replace(said, num_blocks=63)))
            other = Layout(16, "float32", LAYOUT.groups, "another model")
            decode.pool.layout = other
            with pytest.raises(LayoutMismatch, match="altered"):
                await decode.connect(encode(msgspec.structs.replace(said, layout=other)))

    run(story())


def test_socket_paths_are_absolute(folder: str) -> None:
    async def story() -> None:
        async with worker(folder) as (decode, _):
            for path in ("run/x.kv", "", "\0abstract"):
                bad = encode(Description("shm", "prefill-0", 1, LAYOUT, 4, path))
                with pytest.raises(ProtocolError, match="no absolute socket path"):
                    await decode.connect(bad)

    run(story())


@pytest.mark.parametrize("name", ["", "../x", "a b", "x" * 65])
def test_names_that_would_not_do_as_file_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be described"):
        encode(Description("shm", name, 1, LAYOUT, 4, "/x"))


def test_descriptions_are_small_and_of_the_right_kind() -> None:
    good = encode(Description("shm", "prefill-0", 1, LAYOUT, 4, "/run/x"))
    assert decode(good, "shm").layout == LAYOUT and len(good) < 1024
    with pytest.raises(ProtocolError, match="offers 'shm' transport, this is 'local'"):
        decode(good, "local")
    with pytest.raises(ProtocolError, match="at most"):
        decode(good + b"\0" * MAX_BYTES, "shm")
    fields = msgspec.msgpack.decode(good)
    for change in ({"num_blocks": 0}, {"num_blocks": "4"}, {"incarnation": -1}, {"path": "/" * 108}, {"extra": 1}):
        with pytest.raises(ProtocolError):
            decode(msgspec.msgpack.encode(fields | change), "shm")
    for change in ({"dtype": "float7"}, {"block_size": -1}, {"groups": []}, {"order": "token block"}):
        with pytest.raises(ProtocolError):
            decode(msgspec.msgpack.encode(fields | {"layout": fields["layout"] | change}), "shm")


def _liar(path: str, answer: bytes, num_fds: int) -> socket.socket:
    """A listener that answers whoever connects with what a real one would not say."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(path)
    listener.listen()

    def serve() -> None:
        with contextlib.suppress(OSError):
            connection, _ = listener.accept()
            with connection, open(os.devnull) as file:
                connection.recv(100)
                if answer or num_fds:
                    socket.send_fds(connection, [answer], [file.fileno()] * num_fds)

    threading.Thread(target=serve, daemon=True).start()
    return listener


@pytest.mark.parametrize(
    ("answer", "num_fds", "error", "match"),
    [
        (b"", 0, PeerLost, "hung up"),
        (b"hello", 0, ProtocolError, "no answer"),
        (handshake._ANSWER.pack(b"x" * 8, Code.OK, 4), 1, ProtocolError, "does not speak"),
        (handshake._ANSWER.pack(b"diptych1", Code.OK, 4), 0, ProtocolError, "sent 0 descriptors"),
        (handshake._ANSWER.pack(b"diptych1", Code.OK, 4), 1, ProtocolError, "has 0 bytes"),
        (handshake._ANSWER.pack(b"diptych1", Code.OK, 4), 2, TransferError, "prefill-0|bytes"),
        (handshake._ANSWER.pack(b"diptych1", 77, 4), 1, ProtocolError, "code 77"),
        (handshake._ANSWER.pack(b"diptych1", Code.CLOSING, 4), 0, PeerLost, "closing"),
    ],
)
def test_a_lying_owner_is_refused_and_costs_no_descriptor(
    folder: str, answer: bytes, num_fds: int, error: type[Exception], match: str
) -> None:
    async def story() -> None:
        async with worker(folder) as (decode, _):
            listener = _liar(f"{folder}/liar.kv", answer, num_fds)
            before = len(os.listdir("/proc/self/fd"))
            with pytest.raises(error, match=match):
                await decode.connect(encode(Description("shm", "prefill-0", 1, LAYOUT, 4, f"{folder}/liar.kv")), 2)
            await asyncio.sleep(0.02)
            assert len(os.listdir("/proc/self/fd")) <= before
            listener.close()

    run(story())


# --- the owner's side -------------------------------------------------------------------------------------------


async def _answered(owner: ShmTransport, *messages: bytes) -> tuple[bytes, int]:
    """What a stranger who says this gets: the last answer, and how many descriptors."""
    assert owner._exporter is not None
    with handshake.new_socket() as sock:
        sock.connect(owner._exporter.path)
        for message in messages:
            sock.send(message)
            await asyncio.sleep(0.01)
        await shm._readable(sock)
        answer, fds, _, _ = socket.recv_fds(sock, 256, 4)
        for fd in fds:
            os.close(fd)
        return answer, len(fds)


def test_strangers_get_an_answer_but_no_memory(folder: str) -> None:
    async def story() -> None:
        async with worker(folder) as (owner, _):
            good = handshake.hello(LAYOUT, 1)
            for bad in (b"GET / HTTP/1.1", b"x" * 200, good[:-1], good.replace(b"diptych1", b"diptych0")):
                answer, num_fds = await _answered(owner, bad)
                assert answer[8] == Code.MALFORMED and num_fds == 0
            assert (await _answered(owner, good))[1] == 1
            await asyncio.sleep(0.01)
            assert owner._exporter is not None and owner._exporter.num_readers == 0

    run(story())


def test_another_user_gets_nothing(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def check_user(_: socket.socket) -> int:
        raise ProtocolError("runs as user 12")

    async def story() -> None:
        async with worker(folder) as (owner, _):
            monkeypatch.setattr(handshake, "check_user", check_user)
            with pytest.raises((OSError, AssertionError)):
                answer, num_fds = await _answered(owner, handshake.hello(LAYOUT, 1))
                assert answer or num_fds  # the owner hung up
            monkeypatch.undo()

    run(story())


def test_the_user_id_is_the_kernels_word(monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with here, there:
        assert handshake.check_user(here) == os.getpid()
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
        with pytest.raises(ProtocolError, match="not 12345"):
            handshake.check_user(here)


def test_whoever_connects_and_says_nothing_is_shown_out(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "HELLO_S", 0.02)

    async def story() -> None:
        async with worker(folder) as (owner, _):
            assert (await _answered(owner))[0] == b""

    run(story())


def test_closing_does_not_wait_for_the_silent_nor_for_ever(folder: str) -> None:
    async def story() -> None:
        async with worker(folder, "prefill-0") as (owner, _):
            assert owner._exporter is not None
            with handshake.new_socket() as silent, handshake.new_socket() as rude:
                for sock in (silent, rude):
                    sock.connect(owner._exporter.path)
                rude.send(handshake.hello(LAYOUT, 1))  # takes the memory, ignores the goodbye
                await asyncio.sleep(0.02)
                path = Path(owner._exporter.path)
                assert owner._exporter.num_readers == 2 and path.exists()
                await owner.close(drain_s=0.05)
                assert owner._exporter.num_readers == 0 and not path.exists()

    run(story())
