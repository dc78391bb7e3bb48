"""Which way a peer is read, and that nobody takes the slow one unseen."""

import asyncio
import contextlib
import logging
import tempfile
from collections.abc import AsyncIterator, Awaitable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from diptych.errors import ConfigError, PeerLost, ProtocolError
from diptych.transfer import reach
from diptych.transfer.layout import Layout
from diptych.transfer.pool import Pool
from diptych.transfer.reach import Force, Offer, Transports
from diptych.transfer.seam import Plan

LAYOUT = Layout.uniform(layers=2, kv_heads=2, head_dim=16, block_size=16, dtype="float32", model="m")
ANYWHERE = "127.0.0.1:0"


@pytest.fixture
def folder() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="kv") as path:
        yield f"{path}/run"


@contextlib.asynccontextmanager
async def worker(
    folder: str, name: str, listen: str | None = ANYWHERE, force: Force = "auto", key: str = "secret"
) -> AsyncIterator[Transports]:
    pool, transports = Pool(LAYOUT, 4), Transports(name, 1, folder, key, listen, None, force)
    pool.view[:] = len(name)
    transports.register(pool)
    try:
        yield transports
    finally:
        await transports.close(0.2)
        pool.close()


def run(story: Awaitable[None]) -> None:
    async def main() -> None:
        async with asyncio.timeout(30):
            await story

    asyncio.run(main())


def altered(owner: Transports, **changes: object) -> bytes:
    said = msgspec.msgpack.decode(owner.describe(), type=Offer)
    return msgspec.msgpack.encode(msgspec.structs.replace(said, **changes))


async def lane(decode: Transports, description: bytes) -> str:
    """The lane that was taken; a block was read over it."""
    peer = await decode.connect(description)
    ids = np.array([1], np.int32)
    decode.pool.view[:] = 0
    await peer.read(Plan(ids, ids), 10).done()
    assert (decode.pool.view[1] == len("prefill-0")).all()
    await peer.close()
    return peer.lane


@pytest.mark.parametrize(
    ("source", "reader", "expected"),
    [("auto", "auto", "shm"), ("auto", "tcp", "tcp"), ("tcp", "auto", "tcp"), ("auto", "shm", "shm")],
)
def test_shared_memory_on_one_host_unless_told_otherwise(
    folder: str, source: Force, reader: Force, expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    async def story() -> None:
        async with worker(folder, "prefill-0", force=source) as prefill, worker(folder, "d", force=reader) as decode:
            assert await lane(decode, prefill.describe()) == expected
            assert f"worker prefill-0 (incarnation 1) comes over {expected}" in caplog.text

    run(story())


def test_tcp_from_another_host(folder: str, caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        async with worker(folder, "prefill-0") as prefill, worker(folder, "d", listen=None) as decode:
            for host in ("another", ""):
                assert await lane(decode, altered(prefill, host=host)) == "tcp"
            assert "slower" not in caplog.text

    run(story())


def test_a_host_whose_sockets_we_cannot_see_is_read_over_tcp_and_that_is_said(
    folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As between two containers, which share the kernel but not the files."""

    async def story() -> None:
        async with worker(folder, "prefill-0") as prefill, worker(folder, "d") as decode:
            elsewhere = prefill.describe().replace(folder.encode(), folder[:-1].encode() + b"x")
            assert await lane(decode, elsewhere) == "tcp"
            assert "on this host but cannot be reached" in caplog.text

    run(story())


def test_where_there_is_no_way_it_says_what_there_is(folder: str) -> None:
    async def story() -> None:
        async with worker(folder, "prefill-0", listen=None) as prefill, worker(folder, "d", force="tcp") as decode:
            with pytest.raises(PeerLost, match="no way to a peer: shm offered, tcp possible here"):
                await decode.connect(prefill.describe())

    run(story())


def test_without_a_key_or_an_address_nothing_listens(folder: str) -> None:
    async def story() -> None:
        async with worker(folder, "prefill-0", listen=None, key="") as prefill, worker(folder, "d") as decode:
            assert msgspec.msgpack.decode(prefill.describe(), type=Offer).tcp == b""
            assert await lane(decode, prefill.describe()) == "shm"
        with pytest.raises(ConfigError, match="cluster's key"):
            Transports("prefill-0", 1, folder, "", ANYWHERE)
        with pytest.raises(ConfigError, match="no address to listen at"):
            Transports("prefill-0", 1, folder, "secret", force="tcp")

    run(story())


def test_offers_are_not_believed(folder: str) -> None:
    async def story() -> None:
        async with worker(folder, "prefill-0") as prefill, worker(folder, "d") as decode:
            good = prefill.describe()
            for bad in (b"", b"\x80", good[:-1], good + b"x", bytes(1 << 18), altered(prefill, host="x" * 65)):
                with pytest.raises(ProtocolError):
                    await decode.connect(bad)
            with pytest.raises(ProtocolError):
                await decode.connect(altered(prefill, shm=b"junk"))
            with pytest.raises(PeerLost):
                await decode.connect(altered(prefill, shm=b"", tcp=b""))

    run(story())


def test_a_host_has_an_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    assert reach.host_id() == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert not reach._is_our_socket("/dev/null") and not reach._is_our_socket("\0")
