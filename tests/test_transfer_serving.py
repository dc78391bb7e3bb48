"""Who is let in over TCP, what may be asked, and what becomes of those who lie.

Covers `serving.py`, `introduction.py`, `frames.py` and `listening.py`.
"""

import asyncio
import contextlib
import gc
import os
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import get_args

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.errors import LayoutMismatch, PeerLost, ProtocolError
from diptych.transfer import frames, introduction, serving
from diptych.transfer.codec import rows_of
from diptych.transfer.description import Description, encode
from diptych.transfer.handshake import Code
from diptych.transfer.introduction import Purpose
from diptych.transfer.layout import Layout
from diptych.transfer.pool import Pool
from diptych.transfer.seam import NO_PERMIT, PERMIT_BYTES, Codec, Plan, Readable
from diptych.transfer.serving import BlockServer
from diptych.transfer.tcp import TcpTransport

LAYOUT = Layout.uniform(layers=2, kv_heads=2, head_dim=16, block_size=16, dtype="float32", model="m")
NUM_BLOCKS = 8
KEY = "the cluster's key"
PERMIT = bytes(range(PERMIT_BYTES))


@contextlib.asynccontextmanager
async def worker(
    name: str = "prefill-0", key: str = KEY, layout: Layout = LAYOUT, readable: Readable | None = None
) -> AsyncIterator[TcpTransport]:
    pool, transport = Pool(layout, NUM_BLOCKS), TcpTransport(name, 1, key, "127.0.0.1:0")
    pool.view[:] = np.arange(NUM_BLOCKS, dtype=np.uint8)[:, None] + 1
    transport.register(pool, readable)
    try:
        yield transport
    finally:
        await transport.close(0.1)
        pool.close()


def run(story: Awaitable[None]) -> None:
    async def main() -> None:
        async with asyncio.timeout(30):
            await story

    asyncio.run(main())


def server_of(transport: TcpTransport) -> BlockServer:
    assert transport._server is not None
    return transport._server


def card(transport: TcpTransport, **changes: object) -> Description:
    return msgspec.structs.replace(msgspec.msgpack.decode(transport.describe(), type=Description), **changes)


async def dial(owner: TcpTransport) -> socket.socket:
    """A stranger's connection."""
    sock = socket.socket()
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, owner._at)
    return sock


async def reader(owner: TcpTransport) -> socket.socket:
    """A reader that knows the key, and may then say what it likes."""
    sock = await dial(owner)
    await introduction.introduce(sock, card(owner), KEY, Purpose.READ, "owner")
    return sock


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


async def all_of(sock: socket.socket) -> bytes:
    """Everything until the other side hangs up."""
    loop, got = asyncio.get_running_loop(), b""
    with contextlib.suppress(ConnectionResetError):
        while part := await loop.sock_recv(sock, 1 << 16):
            got += part
    sock.close()
    return got


async def still_reads(owner: TcpTransport) -> None:
    """An honest worker reads a block."""
    async with worker("decode-0") as decode:
        decode.pool.view[:] = 0
        peer = await decode.connect(owner.describe())
        ids = np.array([3], np.int32)
        await peer.read(Plan(ids, ids, owner.checksum(ids)), 10).done()
        assert (decode.pool.view[3] == 4).all() and not decode.pool.view[2].any()
        await peer.close()


# --- the key -------------------------------------------------------------------------------------------------------


def test_another_key_is_refused_in_words_and_the_key_never_travels() -> None:
    async def story() -> None:
        async with worker() as owner, worker("decode-0", "another") as stranger:
            with pytest.raises(ProtocolError, match="different cluster keys"):
                await stranger.connect(owner.describe())
            assert server_of(owner).num_readers == 0
            await still_reads(owner)

    run(story())


def test_what_is_said_contains_no_key() -> None:
    here, there = socket.socketpair()
    here.setblocking(False)
    there.setblocking(False)
    said = Description("tcp", "prefill-0", 1, LAYOUT, 4)
    heard = []

    async def overhear(sock: socket.socket, count: int, name: str) -> bytes:
        heard.append(await real(sock, count, name))
        return heard[-1]

    async def story() -> None:
        await asyncio.gather(
            introduction.introduce(here, said, KEY, Purpose.READ, "owner"),
            introduction.meet(there, KEY, "prefill-0", 1, LAYOUT, 4),
        )

    real = introduction._receive
    with here, there, pytest.MonkeyPatch.context() as patch:
        patch.setattr(introduction, "_receive", overhear)
        run(story())
    assert len(heard) == 3 and all(KEY.encode() not in message for message in heard)


def test_a_recorded_introduction_is_of_no_use() -> None:
    async def story() -> None:
        async with worker() as owner:
            recorded = []
            loop = asyncio.get_running_loop()
            first, again = await dial(owner), await dial(owner)
            challenge = await loop.sock_recv(first, 40)
            hello = introduction._HELLO.pack(
                introduction._MAGIC, bytes(32), Purpose.READ, b"prefill-0", 1, LAYOUT.fingerprint().encode()
            )
            hello += introduction.prove(KEY, introduction._READER, challenge, hello)
            for sock in (first, again):
                await loop.sock_sendall(sock, hello)
            recorded = [await loop.sock_recv(first, 100), (await all_of(again))[40:]]
            assert [answer[8] for answer in recorded] == [Code.OK, Code.WRONG_KEY]
            assert not any(recorded[1][introduction._ANSWER.size :])  # nor is the owner made to sign anything
            first.close()

    run(story())


CHALLENGE = introduction._CHALLENGE.pack(introduction._MAGIC, b"n" * 32)
HELLO = introduction._HELLO.pack(
    introduction._MAGIC, b"r" * 32, Purpose.READ, b"prefill-0", 1, LAYOUT.fingerprint().encode()
)
HELLO += introduction.prove(KEY, introduction._READER, CHALLENGE, HELLO)


@given(at=st.integers(0, len(HELLO) - 1), change=st.integers(1, 255))
@settings(max_examples=200, deadline=None)
def test_every_byte_of_a_hello_counts(at: int, change: int) -> None:
    altered = bytearray(HELLO)
    altered[at] ^= change
    judge = lambda hello: introduction.judge(hello, CHALLENGE, KEY, "prefill-0", 1, LAYOUT)  # noqa: E731
    assert judge(HELLO) is Code.OK and judge(bytes(altered)) is Code.WRONG_KEY


def signed(*fields: object) -> bytes:
    body = introduction._HELLO.pack(*fields)
    return body + introduction.prove(KEY, introduction._READER, CHALLENGE, body)


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ((b"diptcp-0", bytes(32), 1, b"prefill-0", 1, LAYOUT.fingerprint().encode()), Code.MALFORMED),
        ((introduction._MAGIC, bytes(32), 9, b"prefill-0", 1, LAYOUT.fingerprint().encode()), Code.MALFORMED),
        ((introduction._MAGIC, bytes(32), 1, b"prefill-1", 1, LAYOUT.fingerprint().encode()), Code.OTHER_WORKER),
        ((introduction._MAGIC, bytes(32), 1, b"prefill-0", 2, LAYOUT.fingerprint().encode()), Code.OTHER_INCARNATION),
        ((introduction._MAGIC, bytes(32), 1, b"prefill-0", 1, bytes(32)), Code.OTHER_LAYOUT),
    ],
)
def test_knowing_the_key_is_not_enough(fields: tuple[object, ...], code: Code) -> None:
    assert introduction.judge(signed(*fields), CHALLENGE, KEY, "prefill-0", 1, LAYOUT) is code


def test_neither_proof_can_be_sent_back_as_the_others() -> None:
    body = b"the same words"
    proofs = {introduction.prove(KEY, who, CHALLENGE, body) for who in (introduction._READER, introduction._OWNER)}
    assert len(proofs) == 2


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"worker": "prefill-1"}, PeerLost, "another worker has the address"),
        ({"incarnation": 2}, PeerLost, "replaced by another incarnation"),
        ({"num_blocks": 7}, ProtocolError, "described 7 blocks but has 8"),
        ({"host": ""}, ProtocolError, "gave no address"),
        ({"port": 0}, ProtocolError, "gave no address"),
    ],
)
def test_who_answers_must_be_who_was_described(changes: dict[str, object], error: type[Exception], match: str) -> None:
    async def story() -> None:
        async with worker() as owner, worker("decode-0") as decode:
            with pytest.raises(error, match=match):
                await decode.connect(encode(card(owner, **changes)))
            await still_reads(owner)

    run(story())


def test_an_altered_layout_is_refused_by_the_owner() -> None:
    other = Layout(16, "float32", LAYOUT.groups, "another model")

    async def story() -> None:
        async with worker() as owner, worker("decode-0", layout=other) as decode:
            with pytest.raises(LayoutMismatch, match="model is 'another model' here and 'm' there"):
                await decode.connect(owner.describe())
            with pytest.raises(LayoutMismatch, match="altered"):
                await decode.connect(encode(card(owner, layout=other)))

    run(story())


def answer(code: int, magic: bytes = introduction._MAGIC, num_blocks: int = 4) -> bytes:
    """What somebody without the key would say."""
    return introduction._ANSWER.pack(magic, code, num_blocks) + bytes(32)


@pytest.mark.parametrize(
    ("says", "error", "match"),
    [
        ((b"HTTP/1.1 400 Bad Request" + bytes(40),), ProtocolError, "does not speak"),
        ((b"diptcp-1" + bytes(32),), ProtocolError, "it says b'diptcp-1', and we b'diptcp-2'"),
        ((), PeerLost, "hung up"),
        ((CHALLENGE[:20],), PeerLost, "hung up"),
        ((CHALLENGE,), PeerLost, "hung up"),
        ((CHALLENGE, answer(Code.OK)), ProtocolError, "does not know the cluster's key"),
        ((CHALLENGE, answer(Code.CLOSING)), ProtocolError, "does not know the cluster's key"),
        ((CHALLENGE, answer(Code.OK, b"diptcp-9")), ProtocolError, "does not speak"),
    ],
)
def test_an_owner_without_the_key_is_refused(says: tuple[bytes, ...], error: type[Exception], match: str) -> None:
    def lie(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            sock, _ = listener.accept()
            with sock:
                for message in says:
                    sock.sendall(message)
                    if message == CHALLENGE:
                        sock.recv(len(HELLO), socket.MSG_WAITALL)

    async def story() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            async with worker("decode-0") as decode:
                liar = threading.Thread(target=lie, args=(listener,))
                liar.start()
                host, port = listener.getsockname()
                said = Description("tcp", "prefill-0", 1, LAYOUT, 4, host=host, port=port)
                before = len(os.listdir("/proc/self/fd"))
                with pytest.raises(error, match=match):
                    await decode.connect(encode(said), 5)
                await asyncio.get_running_loop().run_in_executor(None, liar.join)
                gc.collect()
                assert len(os.listdir("/proc/self/fd")) <= before

    run(story())


# --- strangers -----------------------------------------------------------------------------------------------------


def test_whoever_says_nothing_is_shown_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "HELLO_S", 0.02)

    async def story() -> None:
        async with worker() as owner:
            sock = await dial(owner)
            assert len(await all_of(sock)) == 40  # the challenge, and goodbye
            assert server_of(owner).num_strangers == 0

    run(story())


def test_a_crowd_of_strangers_keeps_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "MAX_STRANGERS", 4)

    async def story() -> None:
        async with worker() as owner:
            crowd = [await dial(owner) for _ in range(20)]
            await still_reads(owner)
            assert server_of(owner).num_strangers <= 4
            for sock in crowd:
                sock.close()

    run(story())


@given(noise=st.binary(min_size=1, max_size=400))
@settings(max_examples=30, deadline=None)
def test_noise_gets_no_further_than_a_hello(noise: bytes) -> None:
    async def story() -> None:
        async with worker() as owner:
            sock = await dial(owner)
            await asyncio.get_running_loop().sock_sendall(sock, noise)
            sock.shutdown(socket.SHUT_WR)
            said = await all_of(sock)
            assert len(said) <= 40 + introduction._ANSWER.size + 32
            assert len(said) <= 40 or said[48] == Code.WRONG_KEY
            assert server_of(owner).num_readers == 0

    run(story())


def test_closing_waits_neither_for_strangers_nor_for_ever() -> None:
    async def story() -> None:
        async with worker() as owner:
            silent, rude = await dial(owner), await reader(owner)
            await until(lambda: server_of(owner).num_readers == 1)
            await owner.close(drain_s=0.05)
            assert server_of(owner).num_readers == server_of(owner).num_strangers == 0
            assert await all_of(rude) == b""
            silent.close()

    run(story())


# --- requests ------------------------------------------------------------------------------------------------------


def request(
    *ids: int,
    count: int | None = None,
    layers: frames.Range = None,
    heads: frames.Range = None,
    codec: Codec = "raw",
    permit: bytes = NO_PERMIT,
) -> bytes:
    asked = frames.Request(1, len(ids) if count is None else count, layers, heads, codec, permit)
    return frames.encode_request(asked, np.array(ids, dtype="<i4").tobytes())


BAD_REQUESTS = [
    b"GET /kv HTTP/1.1\r\nHost: p0\r\n\r\n      ",
    request(count=0),
    request(count=frames.MAX_BLOCKS + 1),
    request(count=(1 << 32) - 1),
    request(NUM_BLOCKS),
    request(-1),
    request(0, 1, 1 << 30),
    request(0, layers=(0, 3)),
    request(0, layers=(1, 1)),
    request(0, heads=(2, 1)),
    request(0, heads=((1 << 32) - 1, (1 << 32) - 1)),
    request(0, 1, count=3),  # and then the end
    request(0)[:-1],
    request(0)[:7],
    request(count=1),
]


@pytest.mark.parametrize("bad", BAD_REQUESTS, ids=range(len(BAD_REQUESTS)))
def test_a_bad_request_ends_its_connection_and_nothing_else(bad: bytes) -> None:
    async def story() -> None:
        async with worker() as owner:
            before = owner.pool.view.copy()
            good, evil = await reader(owner), await reader(owner)
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(evil, bad)
            if len(bad) != frames.REQUEST_BYTES + 4:
                evil.shutdown(socket.SHUT_WR)
            assert await all_of(evil) == b""
            await loop.sock_sendall(good, request(2, 5, heads=(1, 2)))
            good.shutdown(socket.SHUT_WR)
            reply = await all_of(good)
            assert len(reply) == frames.REPLY_BYTES + LAYOUT.block_bytes
            assert set(reply[frames.REPLY_BYTES :]) == {3, 6}
            assert (owner.pool.view == before).all()
            await until(lambda: server_of(owner).num_readers == 0)

    run(story())


@given(head=st.binary(min_size=frames.REQUEST_BYTES, max_size=frames.REQUEST_BYTES))
@settings(max_examples=200, deadline=None)
def test_any_head_is_a_request_or_refused(head: bytes) -> None:
    for candidate in (head, request(0)[:4] + head[4:]):
        try:
            decoded = frames.decode_request(candidate)
        except ProtocolError:
            continue
        assert 1 <= decoded.num_blocks <= frames.MAX_BLOCKS
        assert frames.encode_request(decoded, b"") == candidate


def test_requests_are_what_they_were() -> None:
    for layers, heads in ((None, None), ((0, 1), None), (None, (1, 4)), ((2, 3), (0, 7))):
        for codec in get_args(Codec):
            asked = frames.Request(77, 5, layers, heads, codec, PERMIT)
            assert frames.decode_request(frames.encode_request(asked, b"")) == asked


def test_a_reply_is_the_one_that_is_due_or_its_refusal() -> None:
    assert frames.check_reply(frames.encode_reply(7, 2, 300, 0.5), 7, 2, 300) == 0.5
    assert frames.check_reply(frames.encode_refusal(7, 2), 7, 2, 300) is None
    for head in (frames.encode_reply(7, 2, 300), frames.encode_refusal(7, 2)):
        for number, num_blocks, num_bytes in ((8, 2, 300), (7, 3, 300)):
            with pytest.raises(ProtocolError, match="not the reply"):
                frames.check_reply(head, number, num_blocks, num_bytes)
        for at in range(frames.REPLY_BYTES - 8):  # the last field may be any number
            altered = bytearray(head)
            altered[at] ^= 2
            with pytest.raises(ProtocolError, match="not the reply"):
                frames.check_reply(bytes(altered), 7, 2, 300)
        with pytest.raises(ProtocolError, match="ended after"):
            frames.check_reply(head[:-1], 7, 2, 300)


@pytest.mark.parametrize("codec", get_args(Codec))
def test_what_is_not_readable_is_refused_and_the_connection_goes_on(codec: Codec) -> None:
    asked: list[tuple[bytes, list[int]]] = []

    def readable(permit: bytes, blocks: list[int]) -> bool:
        asked.append((permit, blocks))
        return permit == PERMIT and 3 not in blocks

    async def story() -> None:
        async with worker(readable=readable) as owner:
            sock = await reader(owner)
            refused = [request(2, codec=codec), request(2, 3, codec=codec, permit=PERMIT)]
            refused.append(request(2, NUM_BLOCKS, codec=codec, permit=bytes(PERMIT_BYTES)))  # it learns nothing of it
            for words in (*refused, request(2, 5, codec=codec, permit=PERMIT)):
                await asyncio.get_running_loop().sock_sendall(sock, words)
            sock.shutdown(socket.SHUT_WR)
            said = await all_of(sock)
            no = [frames.encode_refusal(1, count) for count in (1, 2, 2)]
            assert said.startswith(b"".join(no))
            rows = rows_of(LAYOUT)
            assert rows is not None
            block_bytes = LAYOUT.block_bytes if codec == "raw" else rows.encoded_bytes
            reply = said[3 * frames.REPLY_BYTES :]
            assert len(reply) == frames.REPLY_BYTES + 2 * block_bytes
            assert frames.check_reply(reply[: frames.REPLY_BYTES], 1, 2, 2 * block_bytes) is not None
            assert asked[1:] == [(PERMIT, [2, 3]), (NO_PERMIT, [2, NUM_BLOCKS]), (PERMIT, [2, 5])]

    run(story())


def test_a_judge_that_fails_lets_nothing_out() -> None:
    def readable(permit: bytes, blocks: list[int]) -> bool:
        raise KeyError(permit)

    async def story() -> None:
        async with worker(readable=readable) as owner:
            sock = await reader(owner)
            await asyncio.get_running_loop().sock_sendall(sock, request(2))
            assert await all_of(sock) == b""

    run(story())


def test_what_is_said_on_the_silent_connection_ends_it() -> None:
    async def story() -> None:
        async with worker() as owner:
            sock = await dial(owner)
            await introduction.introduce(sock, card(owner), KEY, Purpose.WATCH, "owner")
            await asyncio.get_running_loop().sock_sendall(sock, request(0))
            assert await all_of(sock) == b""

    run(story())


def test_a_reader_that_leaves_is_forgotten_with_its_thread() -> None:
    async def story() -> None:
        async with worker() as owner:
            before = threading.active_count()
            socks = [await reader(owner) for _ in range(3)]
            await until(lambda: server_of(owner).num_readers == 3)
            assert threading.active_count() == before + 3
            for sock in socks:
                sock.close()
            await until(lambda: server_of(owner).num_readers == 0 and threading.active_count() == before)

    run(story())
