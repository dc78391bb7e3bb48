"""int8 on the wire: what it costs in accuracy, that native and numpy agree, what is noticed, and when it is chosen."""

import asyncio
from collections.abc import Awaitable, Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from diptych.errors import TransferError
from diptych.transfer import native
from diptych.transfer.codec import MIN_BYTES, Chooser, Staging, rows_of
from diptych.transfer.layout import Group, Layout
from diptych.transfer.native import int8, sockets
from diptych.transfer.pool import Pool
from diptych.transfer.reading import ThreadedPeer
from diptych.transfer.seam import Plan
from diptych.transfer.shm import ShmTransport
from diptych.transfer.tcp import TcpTransport

DTYPES = sorted(int8.DTYPES)
NUM_BLOCKS = 12


def layout(dtype: str = "float32") -> Layout:
    return Layout.uniform(layers=3, kv_heads=2, head_dim=24, block_size=4, dtype=dtype, model="m")


def noise(shape: int8.Rows, seed: int = 0) -> tuple[NDArray[np.float32], native.Blocks]:
    """Normal values of very different sizes, row by row, as float32 and as blocks of a dtype."""
    rng = np.random.default_rng(seed)
    wide = rng.standard_normal((NUM_BLOCKS, shape.rows, shape.dim)) * np.exp(
        rng.uniform(-6, 4, (NUM_BLOCKS, shape.rows, 1))
    )
    wide[0, 0], wide[0, 1], wide[0, 2, 1:] = 0.0, -3.0, 0.0
    exact = np.ascontiguousarray(int8._narrow(wide.astype(np.float32).reshape(-1), shape.dtype))
    blocks = exact.view(np.uint8).reshape(NUM_BLOCKS, -1)
    return widened(blocks, shape), blocks


def widened(blocks: native.Blocks, shape: int8.Rows) -> NDArray[np.float32]:
    return int8._widen(blocks.reshape(-1), shape.dtype).reshape(len(blocks), shape.rows, shape.dim)


def there_and_back(blocks: native.Blocks, shape: int8.Rows) -> tuple[native.Blocks, native.Blocks]:
    ids = np.arange(len(blocks), dtype=np.int32)
    encoded, back = np.full((len(blocks), shape.encoded_bytes), 7, np.uint8), np.zeros_like(blocks)
    int8.encode(blocks, ids, shape, encoded)
    assert int8.decode(encoded, back, ids, shape) == len(ids)
    return encoded, back


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_element_is_off_by_more_than_half_a_scale(dtype: str) -> None:
    shape = rows_of(layout(dtype))
    assert shape is not None
    wide, blocks = noise(shape)
    _, back = there_and_back(blocks, shape)
    scale = np.abs(wide).max(axis=2, keepdims=True) / 127
    last = {"float32": 2.0**-23, "bfloat16": 2.0**-8, "float16": 2.0**-11}[dtype]  # the dtype's own rounding
    assert (np.abs(widened(back, shape) - wide) <= 0.5001 * scale + last * np.abs(wide) + 2.0**-24).all()
    assert (widened(back, shape)[0, :1] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_native_and_numpy_agree_bit_for_bit(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native.available():
        pytest.skip("nothing was compiled")
    shape = rows_of(layout(dtype))
    assert shape is not None
    blocks = noise(shape)[1].copy()
    blocks[1] = np.random.default_rng(1).integers(0, 256, blocks.shape[1], dtype=np.uint8) & 0x7B  # any finite bits
    fast = there_and_back(blocks, shape)
    monkeypatch.setattr(native, "library", lambda: None)
    slow = there_and_back(blocks, shape)
    assert (fast[0] == slow[0]).all() and (fast[1] == slow[1]).all()


def test_what_can_be_encoded() -> None:
    assert rows_of(layout()) == int8.Rows("float32", 3 * 2 * 2 * 4, 24)
    assert rows_of(layout("int8")) is None
    latent = Layout(16, "bfloat16", (Group((0, 1), 1, 576, 0, "latent"),), "m")
    assert rows_of(latent) == int8.Rows("bfloat16", 32, 576)
    assert rows_of(Layout(16, "bfloat16", (Group((0,), 2, 192, 128),), "m")) is None
    with pytest.raises(ValueError, match="contiguous"):
        int8.encode(
            np.zeros((1, 8), np.uint8), np.zeros(1, np.int32), int8.Rows("float32", 1, 4), np.zeros((1, 40), np.uint8)
        )


def test_staging_is_bounded_and_kept() -> None:
    staging = Staging(int8.Rows("bfloat16", 1 << 14, 128))
    assert staging.room == 2 and staging.take(2).base is staging.take(1).base
    assert Staging(int8.Rows("bfloat16", 1 << 18, 128)).room == 1


# --- over TCP ----------------------------------------------------------------------------------------------------


def between(
    story: Callable[[ThreadedPeer, Pool, Pool, TcpTransport], Awaitable[None]], num_blocks: int = NUM_BLOCKS
) -> None:
    """Run a story about two connected workers, of which one has floats in its pool."""

    async def main() -> None:
        prefill, decode = (TcpTransport(name, 1, "secret", "127.0.0.1:0") for name in ("prefill-0", "decode-0"))
        source, target = Pool(layout(), num_blocks), Pool(layout(), num_blocks)
        source.view.view(np.float32)[:] = (
            np.random.default_rng(0).standard_normal(source.view.size // 4).reshape(num_blocks, -1)
        )
        prefill.register(source)
        decode.register(target)
        async with asyncio.timeout(20):
            await story(await decode.connect(prefill.describe()), source, target, prefill)
            await asyncio.gather(decode.close(), prefill.close())

    asyncio.run(main())


def plan(prefill: TcpTransport, source: list[int], target: list[int]) -> Plan:
    ids = np.array(source, np.int32)
    return Plan(ids, np.array(target, np.int32), prefill.checksum(ids), codec="int8")


@pytest.mark.parametrize("how", ["native", "numpy"])
def test_blocks_arrive_almost_as_they_were(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "numpy":
        monkeypatch.setattr(native, "library", lambda: None)

    async def story(peer: ThreadedPeer, source: Pool, target: Pool, prefill: TcpTransport) -> None:
        stats = await peer.read(plan(prefill, [3, 1, 4], [0, 2, 5]), 10).done()
        shape = rows_of(layout())
        assert shape is not None
        assert (stats.codec, stats.why, stats.num_bytes) == ("int8", "as configured", 3 * layout().block_bytes)
        assert stats.wire_bytes == 3 * shape.encoded_bytes < stats.num_bytes / 3
        got, sent = target.view[[0, 2, 5]].view(np.float32), source.view[[3, 1, 4]].view(np.float32)
        assert 0 < np.abs(got - sent).max() < 4 / 254
        assert not target.view[[1, 3, 4, *range(6, NUM_BLOCKS)]].any()

    between(story)


def test_more_than_a_staging_full() -> None:
    num_blocks = 2 * Staging(rows_of(layout())).room + 5

    async def story(peer: ThreadedPeer, source: Pool, target: Pool, prefill: TcpTransport) -> None:
        everything = list(range(num_blocks))
        reads = [peer.read(plan(prefill, everything[i::2], everything[i::2]), 10) for i in range(2)]
        await asyncio.gather(*(read.done() for read in reads))
        assert np.abs(target.view.view(np.float32) - source.view.view(np.float32)).max() < 6 / 254

    between(story, num_blocks)


def test_a_block_written_again_is_noticed() -> None:
    async def story(peer: ThreadedPeer, source: Pool, target: Pool, prefill: TcpTransport) -> None:
        stale = plan(prefill, [4, 5, 6], [0, 1, 2])
        source.view[5, 17] ^= 1  # less than the codec loses
        with pytest.raises(TransferError, match="checksum differs for 1 of 3 blocks, .*block 5"):
            await peer.read(stale, 10).done()
        await peer.read(plan(prefill, [4, 5, 6], [0, 1, 2]), 10).done()  # the peer lives on

    between(story)


def test_damage_on_the_way_is_noticed_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    real = sockets.send

    def damaged(sock: object, head: bytes, payload: sockets.Batch) -> None:
        payload.blocks[1, 400] ^= 4
        real(sock, head, payload)  # type: ignore[arg-type]

    monkeypatch.setattr(sockets, "send", damaged)

    async def story(peer: ThreadedPeer, source: Pool, target: Pool, prefill: TcpTransport) -> None:
        with pytest.raises(TransferError, match="travelled differs for the peer's block 5"):
            await peer.read(plan(prefill, [4, 5, 6], [0, 1, 2]), 10).done()
        assert target.view[0].any() and not target.view[1:3].any()

    between(story)


def test_over_shared_memory_nothing_is_encoded(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("r")

    async def main() -> None:
        prefill, decode = (ShmTransport(name, 1, folder) for name in ("prefill-0", "decode-0"))
        pools = Pool(layout(), 2), Pool(layout(), 2)
        pools[0].view[:] = 3
        prefill.register(pools[0])
        decode.register(pools[1])
        peer = await decode.connect(prefill.describe())
        ids = np.arange(2, dtype=np.int32)
        stats = await peer.read(Plan(ids, ids, prefill.checksum(ids), codec="int8"), 10).done()
        assert stats.codec == "raw" and (pools[1].view == 3).all()
        await asyncio.gather(decode.close(), prefill.close())

    asyncio.run(main())


# --- choosing ----------------------------------------------------------------------------------------------------

MB = 1 << 20
ROWS = int8.Rows("float32", 1024, 60)  # int8 takes 64 bytes where raw takes 240, but for the checksums


def chooser(link_bytes_per_s: float, codec_bytes_per_s: float) -> Chooser:
    made = Chooser(ROWS)
    made.crossed(MB, MB / link_bytes_per_s)
    for _ in range(3):
        assert made.choose("auto", MB).why == "to measure the codec"
        made.coded(MB, MB / codec_bytes_per_s)
    return made


def test_the_rule() -> None:
    """Bytes saved / bandwidth against encoding and decoding: here that is even at 0.733 of the codec's speed."""
    slow, fast = chooser(0.66e9, 1e9), chooser(0.8e9, 1e9)
    assert slow.choose("auto", MB).codec == "int8" and fast.choose("auto", MB).codec == "raw"
    assert "saves 1.16 ms at 0.66 GB/s, costs up to 1.05 ms" in slow.choose("auto", MB).why
    assert slow.break_even_bytes_per_s == pytest.approx(0.733e9, rel=0.01)


def test_what_varies_is_not_relied_on() -> None:
    """A codec that takes 1 ms or 2, by turns, is not taken for what saves 1.8."""
    steady, busy = chooser(0.42e9, 1e9), chooser(0.42e9, 1e9)
    for turn in range(40):
        steady.coded(MB, 1.5e-9 * MB)
        busy.coded(MB, (1e-9, 2e-9)[turn % 2] * MB)
    assert steady.codec_s_per_byte == pytest.approx(busy.codec_s_per_byte, rel=0.06)
    assert steady.choose("auto", MB).codec == "int8" and busy.choose("auto", MB).codec == "raw"
    assert [busy.choose("auto", MB).codec for _ in range(32)].count("int8") == 2, "it is tried again before long"


def test_nothing_is_lost_that_was_not_asked_for() -> None:
    assert chooser(1e6, 1e9).choose("raw", MB).codec == "raw"
    assert Chooser(ROWS).choose("int8", 8).codec == "int8"
    assert Chooser(None).choose("int8", MB) == Chooser(ROWS).choose("int8", MB, whole=False)
    assert Chooser(None).choose("auto", MB).codec == "raw"


def test_until_a_link_is_measured_it_is_raw_and_small_reads_stay_so() -> None:
    made = Chooser(ROWS)
    assert made.choose("auto", MB).why == "the link is not measured yet"
    assert chooser(1e6, 1e9).choose("auto", MIN_BYTES - 1).codec == "raw"


def test_what_changes_is_noticed() -> None:
    made = chooser(1e6, 1e9)
    for _ in range(20):
        made.crossed(MB, MB / 1e12)
    assert made.choose("auto", MB).codec == "raw"
    asked = [made.choose("auto", MB).codec for _ in range(300)]
    assert asked.count("int8") == 1  # the codec is tried again, now and then
