"""The compiled routines against the numpy ones, what the checksum notices, and how the library comes about."""

import contextlib
import ctypes
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diptych.errors import ProtocolError
from diptych.transfer import native
from diptych.transfer.native import build, fallback, sockets

needs_native = pytest.mark.skipif(not native.available(), reason="no C++ compiler here")


def random_blocks(seed: int, num_blocks: int, words: int) -> native.Blocks:
    return np.random.default_rng(seed).integers(0, 256, (num_blocks, words * 8), dtype=np.uint8)


def ids(*numbers: int) -> native.Ids:
    return np.array(numbers, dtype=np.int32)


def checksum(block: native.Blocks) -> int:
    return int(native.checksum_blocks(np.ascontiguousarray(block).reshape(1, -1), ids(0))[0])


# --- both implementations are one function ---------------------------------------------------------------------


@needs_native
@given(seed=st.integers(0, 1 << 32), words=st.integers(1, 200))
@settings(max_examples=150, deadline=None)
def test_numpy_and_native_agree_bit_for_bit(seed: int, words: int) -> None:
    source = random_blocks(seed, 6, words)
    targets = [np.zeros((5, words * 8), dtype=np.uint8) for _ in range(2)]
    sums = [np.zeros(3, dtype=np.uint64) for _ in range(2)]
    to, origin = ids(4, 0, 2), ids(5, 1, 1)
    assert native.copy_blocks(targets[0], source, to, origin, sums[0]) == 3
    assert fallback.copy_blocks(targets[1], source, to, origin, sums[1], None) == 3
    assert (targets[0] == targets[1]).all() and (targets[0][to] == source[origin]).all()
    assert (sums[0] == sums[1]).all()
    assert (sums[0] == native.checksum_blocks(source, origin)).all()
    assert (sums[0] == fallback.checksum_blocks(source, origin)).all()


@needs_native
@pytest.mark.parametrize("words", [1, 7, 8, 9, 15, 16, 17, 511, 512, 4096, 4099])
def test_special_contents_agree(words: int) -> None:
    top = np.full(words, 1 << 63, dtype=np.uint64).view(np.uint8)
    rows = [np.zeros(words * 8, np.uint8), np.full(words * 8, 255, np.uint8), top]
    blocks = np.stack(rows)
    assert (native.checksum_blocks(blocks, ids(0, 1, 2)) == fallback.checksum_blocks(blocks, ids(0, 1, 2))).all()


@needs_native
@pytest.mark.parametrize("extra", ["-DDIPTYCH_WIDEST=32", "-DDIPTYCH_WIDEST=16", "-DDIPTYCH_PORTABLE"])
def test_every_instruction_set_gives_the_same(extra: str, tmp_path: Path) -> None:
    compiler, path = build.find_compiler(), tmp_path / "copy.so"
    assert compiler is not None
    subprocess.run([compiler, *build.FLAGS, extra, str(build.SOURCE), "-o", str(path)], check=True, timeout=60)
    narrow = ctypes.CDLL(str(path)).diptych_copy_blocks
    narrow.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 2 + [ctypes.c_void_p] * 2
    for words in (1, 8, 13, 512):
        source, target, sums = (
            random_blocks(words, 3, words),
            np.zeros((3, words * 8), np.uint8),
            np.zeros(2, np.uint64),
        )
        to, origin = ids(0, 2), ids(2, 1)
        addresses = [array.ctypes.data for array in (target, source, to, origin)]
        narrow(*addresses, 2, words * 8, sums.ctypes.data, None)
        assert (sums == fallback.checksum_blocks(source, origin)).all() and (target[to] == source[origin]).all()


@needs_native
def test_pieces_agree() -> None:
    source, pieces = random_blocks(1, 4, 32), [(0, 8), (16, 3), (100, 156)]
    targets = [np.zeros((4, 256), dtype=np.uint8) for _ in range(2)]
    assert native.copy_pieces(targets[0], source, ids(3, 1), ids(0, 2), pieces) == 2
    assert fallback.copy_pieces(targets[1], source, ids(3, 1), ids(0, 2), pieces, None) == 2
    assert (targets[0] == targets[1]).all()
    assert (targets[0][3, 16:19] == source[0, 16:19]).all() and not targets[0][3, 8:16].any()


# --- over a socket ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sender", [pytest.param("native", marks=needs_native), "python"])
@pytest.mark.parametrize("receiver", [pytest.param("native", marks=needs_native), "python"])
@given(data=st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_blocks_cross_a_socket_alike(sender: str, receiver: str, data: st.DataObject) -> None:
    """Whatever the pieces, and wherever it was interrupted."""
    size, n = 8 * data.draw(st.integers(1, 4000)), data.draw(st.integers(1, 9))
    cuts = sorted(data.draw(st.sets(st.integers(0, size), min_size=2, max_size=6)))
    pieces = (
        None if data.draw(st.booleans()) else tuple((a, b - a) for a, b in zip(cuts[::2], cuts[1::2], strict=False))
    )
    source, target = random_blocks(1, 12, size // 8), np.zeros((12, size), dtype=np.uint8)
    origin, to = (np.random.default_rng(seed).permutation(12)[:n].astype(np.int32) for seed in (2, 3))
    sums = np.zeros(n, dtype=np.uint64) if pieces is None else None
    here, there = socket.socketpair()
    wake = os.eventfd(0)

    def by(how: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if how == "native" else patched_away()

    landing, at = sockets.batch(target, to, pieces), 0
    with here, there:
        if sender == "native":
            job = threading.Thread(target=sockets.send, args=(here, b"head", sockets.batch(source, origin, pieces)))
        else:
            job = threading.Thread(target=sockets._send, args=(here, b"head", sockets.batch(source, origin, pieces)))
        job.start()
        assert there.recv(4) == b"head"
        with by(receiver):
            while at < landing.num_bytes:
                at = sockets.receive(there, wake, landing, at, sums)
        job.join()
        os.eventfd_write(wake, 1)
        assert sockets.receive(there, wake, landing, 0) == 0  # nothing there, and somebody calls
        assert sockets.receive(there, wake, landing, 0, None, np.ones(1, dtype=np.int32)) == 0
        here.close()
        with pytest.raises(ConnectionResetError):
            sockets.receive(there, wake, landing, 0)
    os.close(wake)
    expected = np.zeros_like(target)
    for first, length in pieces if pieces is not None else ((0, size),):
        expected[to, first : first + length] = source[origin, first : first + length]
    assert (target == expected).all()
    if sums is not None:
        assert (sums == native.checksum_blocks(source, origin)).all()


@contextlib.contextmanager
def patched_away() -> Iterator[None]:
    """As on a machine without a compiler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "library", lambda: None)
        yield


def test_nothing_outside_a_pool_crosses() -> None:
    pool = random_blocks(1, 4, 4)
    for numbers, pieces in (((4,), None), ((-1,), None), ((0,), ((0, 33),)), ((0,), ((-1, 8),)), ((0,), ((0, 0),))):
        with pytest.raises(ProtocolError):
            sockets.batch(pool, ids(*numbers), pieces)
    with pytest.raises(ProtocolError):
        sockets.batch(pool, ids(0), ())


def test_the_checksum_is_a_wire_format() -> None:
    """Two workers of different versions must agree: change these numbers only together with the protocol."""
    blocks = np.arange(2 * 72, dtype=np.uint8).reshape(2, 72)
    assert [hex(s) for s in native.checksum_blocks(blocks, ids(0, 1))] == ["0xe7e1e18246f84344", "0xa087fe65de927084"]


# --- what the checksum notices ---------------------------------------------------------------------------------


@given(seed=st.integers(0, 1 << 32), words=st.integers(1, 100), data=st.data())
@settings(max_examples=100, deadline=None)
def test_any_changed_word_shows(seed: int, words: int, data: st.DataObject) -> None:
    block = random_blocks(seed, 1, words)
    before = checksum(block)
    block[0, data.draw(st.integers(0, words * 8 - 1))] ^= data.draw(st.integers(1, 255))
    assert checksum(block) != before


def test_every_single_bit_shows() -> None:
    block = random_blocks(3, 1, 9)
    sums = {checksum(block)}
    for bit in range(block.size * 8):
        changed = block.copy()
        changed[0, bit // 8] ^= 1 << (bit % 8)
        sums.add(checksum(changed))
    assert len(sums) == block.size * 8 + 1


def test_every_swap_of_two_words_shows() -> None:
    """Also of words that differ in their top bit only, which a Fletcher sum misses at even distances."""
    for words in (random_blocks(4, 1, 40).view(np.uint64)[0], np.arange(40, dtype=np.uint64) % 2 << np.uint64(63)):
        before = checksum(words.view(np.uint8))
        for i in range(40):
            for j in range(i):
                if words[i] != words[j]:
                    swapped = words.copy()
                    swapped[[i, j]] = words[[j, i]]
                    assert checksum(swapped.view(np.uint8)) != before, (i, j)


def test_swapped_heads_and_rotated_rows_show() -> None:
    block = random_blocks(5, 1, 512)[0]
    variants = [block, np.roll(block, 64), np.roll(block, 8), np.roll(block, 2048), block[::-1].copy()]
    assert len({checksum(variant) for variant in variants}) == len(variants)


def test_zeros_are_not_all_alike() -> None:
    sums = {checksum(np.zeros(words * 8, dtype=np.uint8)) for words in range(1, 200)}
    assert len(sums) == 199 and 0 not in sums
    assert checksum(random_blocks(6, 1, 16)) not in sums


def test_a_copy_reports_what_was_written_not_what_was_offered() -> None:
    source, target = random_blocks(7, 2, 16), np.zeros((2, 128), dtype=np.uint8)
    offered = native.checksum_blocks(source, ids(0, 1))
    source[1, 5] ^= 1
    sums = np.zeros(2, dtype=np.uint64)
    native.copy_blocks(target, source, ids(0, 1), ids(0, 1), sums)
    assert sums[0] == offered[0] and sums[1] != offered[1]


# --- the gate before raw addresses -----------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [[-1], [4], [0, 1 << 31], [0, 1 << 40], [0.5], [[0]], ["a"]])
def test_ids_outside_the_pool_never_reach_the_copy(bad: list[object]) -> None:
    blocks = random_blocks(8, 4, 8)
    good, wrong = np.zeros(len(bad), dtype=np.int32), np.array(bad)
    for to, origin in ((good, wrong), (wrong, good)):
        with pytest.raises(ProtocolError):
            native.copy_blocks(blocks.copy(), blocks, to, origin)
        with pytest.raises(ProtocolError):
            native.copy_pieces(blocks.copy(), blocks, to, origin, [(0, 8)])
    with pytest.raises(ProtocolError):
        native.checksum_blocks(blocks, wrong)


def test_lists_and_pieces_must_fit() -> None:
    blocks = random_blocks(9, 4, 8)
    with pytest.raises(ProtocolError, match="2 source blocks for 1"):
        native.copy_blocks(blocks.copy(), blocks, ids(0), ids(0, 1))
    for piece in ((0, 65), (-8, 8), (60, 8), (0, -1)):
        with pytest.raises(ProtocolError, match="outside"):
            native.copy_pieces(blocks.copy(), blocks, ids(0), ids(1), [piece])


def test_memory_of_the_wrong_kind_is_a_mistake_of_ours() -> None:
    blocks = random_blocks(10, 4, 8)
    frozen = blocks.copy()
    frozen.flags.writeable = False
    for target in (frozen, np.zeros((4, 72), np.uint8), np.zeros((4, 8), np.uint64), blocks[:, ::2]):
        with pytest.raises(ValueError):
            native.copy_blocks(target, blocks, ids(0), ids(1))
    with pytest.raises(ValueError, match="sums"):
        native.copy_blocks(blocks.copy(), blocks, ids(0), ids(1), np.zeros(2, dtype=np.uint64))


def test_nothing_to_copy_is_fine() -> None:
    blocks = random_blocks(11, 1, 8)
    assert native.copy_blocks(blocks.copy(), blocks, ids(), ids(), np.zeros(0, np.uint64)) == 0
    assert len(native.checksum_blocks(blocks, ids())) == 0


# --- stopping --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["native", "numpy"])
def test_a_set_flag_stops_before_the_first_block(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "numpy":
        monkeypatch.setattr(native, "library", lambda: None)
    source, target = random_blocks(12, 2, 8), np.zeros((2, 64), dtype=np.uint8)
    flag = np.ones(1, dtype=np.int32)
    assert native.copy_blocks(target, source, ids(0, 1), ids(0, 1), None, flag) == 0
    assert native.copy_pieces(target, source, ids(0, 1), ids(0, 1), [(0, 64)], flag) == 0
    assert not target.any()


@needs_native
def test_a_flag_set_meanwhile_stops_between_blocks_with_the_interpreter_free() -> None:
    source = np.zeros((1, 1 << 20), dtype=np.uint8)
    target = np.zeros((2, 1 << 20), dtype=np.uint8)
    n, flag, done = 1 << 20, np.zeros(1, dtype=np.int32), []
    zeros = np.zeros(n, dtype=np.int32)
    thread = threading.Thread(target=lambda: done.append(native.copy_blocks(target, source, zeros, zeros, None, flag)))
    thread.start()  # a million blocks of a megabyte: minutes of work
    flag[0] = 1
    thread.join(30)
    assert len(done) == 1 and done[0] < n


# --- where the library comes from ------------------------------------------------------------------------------


@needs_native
def test_processes_that_start_together_build_once(tmp_path: Path) -> None:
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "diptych.transfer.native"]
    both = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    paths = {process.communicate(timeout=120)[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0] and len(paths) == 1
    library = Path(paths.pop())
    assert library.is_relative_to(tmp_path) and ctypes.CDLL(str(library)).diptych_copy_blocks
    assert {path.suffix for path in library.parent.iterdir()} == {".so", ".lock"}


def test_without_a_compiler_numpy_does_it_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(build, "find_compiler", lambda: None)
    monkeypatch.setattr(build, "_key", lambda *_: "none")  # nothing prebuilt either
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert not native.available() and not native.available()
        assert len(caplog.records) == 1 and "no C++ compiler" in caplog.text
        blocks = random_blocks(13, 2, 9)
        target = np.zeros_like(blocks)
        native.copy_blocks(target, blocks, ids(0, 1), ids(1, 0))
        assert (target == blocks[::-1]).all()
    finally:
        native.library.cache_clear()


def test_a_failing_compiler_is_quoted(tmp_path: Path) -> None:
    with pytest.raises(build.BuildError, match="failed"):
        build.build("false", tmp_path / "copy.so")
    assert not list(tmp_path.glob("*.tmp"))


def test_a_library_others_could_replace_is_not_loaded(tmp_path: Path) -> None:
    library = tmp_path / "copy.so"
    library.touch()
    library.chmod(0o666)
    with pytest.raises(build.BuildError, match="other users"):
        build._refuse_others_files(library)
