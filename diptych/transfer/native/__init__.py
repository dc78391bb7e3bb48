"""Block copies and checksums: one native call per plan with the GIL released, or numpy where nothing was compiled.

This is the last gate before raw addresses: every id is checked against the pool it points into, here, on every call.
`available()` says which of the two runs; the first call may compile (`build.py`), so transports make it when they
register a pool, not during a read.

Not responsible for what a plan means (`copying.py`), for threads, or for time limits beyond the cancel flag.
"""

import ctypes
import functools
import logging
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from diptych.errors import ProtocolError
from diptych.transfer.native import build, fallback

log = logging.getLogger(__name__)

Blocks = NDArray[np.uint8]  # [num_blocks, block_bytes]
Ids = NDArray[np.int32]  # [n]
Flag = NDArray[np.int32]  # [1]; whoever sets it to 1 stops a copy before its next block


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled routines, or None (said once in the log) where they cannot be had."""
    try:
        lib = ctypes.CDLL(str(build.find_or_build()))
    except (OSError, RuntimeError, build.BuildError) as error:  # RuntimeError: no home directory
        log.warning("KV copies fall back to numpy, which is slower and holds the GIL more: %s", error)
        return None
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    lib.diptych_copy_blocks.argtypes = [pointer, pointer, pointer, pointer, size, size, pointer, pointer]
    lib.diptych_copy_blocks.restype = size
    lib.diptych_copy_pieces.argtypes = [*[pointer] * 4, size, size, pointer, pointer, size, pointer]
    lib.diptych_copy_pieces.restype = size
    lib.diptych_checksum_blocks.argtypes = [pointer, pointer, size, size, pointer]
    lib.diptych_checksum_blocks.restype = None
    _declare_sockets(lib)
    _declare_int8(lib)
    return lib


def _declare_sockets(lib: ctypes.CDLL) -> None:
    """For `sockets.py`."""
    pointer, size, descriptor = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    lib.diptych_send.argtypes = [descriptor, pointer, size, *[pointer] * 2, size, size, *[pointer] * 2, size]
    lib.diptych_send.restype = size
    lib.diptych_receive.argtypes = [descriptor, descriptor, *[pointer] * 2, size, size, *[pointer] * 2, size]
    lib.diptych_receive.argtypes += [size, pointer, pointer]  # at, sums, cancel
    lib.diptych_receive.restype = size


def _declare_int8(lib: ctypes.CDLL) -> None:
    """For `int8.py`."""
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    lib.diptych_encode_int8.argtypes = [pointer, size, pointer, pointer, size, size, number, size, size]
    lib.diptych_encode_int8.restype = None
    lib.diptych_decode_int8.argtypes = [
        pointer,
        size,
        pointer,
        pointer,
        size,
        size,
        number,
        size,
        size,
        pointer,
        pointer,
    ]
    lib.diptych_decode_int8.restype = size


def available() -> bool:
    """Whether the compiled routines are in use. May take the time of a compilation when first asked."""
    return library() is not None


def check_ids(ids: NDArray[np.integer], num_blocks: int, whose: str) -> Ids:
    """`ids` as a private int32 array, each of them a block of a pool of `num_blocks`; ProtocolError otherwise."""
    ids = np.asarray(ids)
    if ids.ndim != 1 or (len(ids) and ids.dtype.kind not in "iu"):
        raise ProtocolError(f"{whose} block ids are not a list of integers")
    if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= num_blocks):
        raise ProtocolError(f"{whose} block ids {ids.min()} to {ids.max()} are not all among {num_blocks} blocks")
    return np.array(ids, dtype=np.int32)


def copy_blocks(
    target: Blocks,
    source: Blocks,
    target_ids: Ids,
    source_ids: Ids,
    sums: NDArray[np.uint64] | None = None,
    cancel: Flag | None = None,
) -> int:
    """Copy whole blocks; returns how many were copied before `cancel` was seen (all, without one).

    sums: uint64 [n], filled with the checksums of the bytes that were written; None to do without.
    Raises ProtocolError for ids outside their pools.
    """
    target_ids, source_ids = _check_pair(target, source, target_ids, source_ids)
    n, lib = len(target_ids), library()
    if sums is not None and (sums.dtype != np.uint64 or sums.shape != (n,) or not sums.flags.c_contiguous):
        raise ValueError(f"sums must be uint64 [{n}]")
    if lib is None:
        return fallback.copy_blocks(target, source, target_ids, source_ids, sums, cancel)
    done: int = lib.diptych_copy_blocks(
        target.ctypes.data,
        source.ctypes.data,
        target_ids.ctypes.data,
        source_ids.ctypes.data,
        n,
        target.shape[1],
        None if sums is None else sums.ctypes.data,
        None if cancel is None else cancel.ctypes.data,
    )
    return done


def copy_pieces(
    target: Blocks,
    source: Blocks,
    target_ids: Ids,
    source_ids: Ids,
    pieces: Sequence[tuple[int, int]],
    cancel: Flag | None = None,
) -> int:
    """Copy the same pieces, (offset, length) in bytes, of each block; returns how many blocks were done."""
    target_ids, source_ids = _check_pair(target, source, target_ids, source_ids)
    offsets, lengths = np.array(pieces, dtype=np.int64).reshape(-1, 2).T.copy()
    if len(pieces) and (min(offsets.min(), lengths.min()) < 0 or (offsets + lengths).max() > target.shape[1]):
        raise ProtocolError(f"a piece lies outside its block of {target.shape[1]} bytes")
    lib = library()
    if lib is None:
        return fallback.copy_pieces(target, source, target_ids, source_ids, pieces, cancel)
    done: int = lib.diptych_copy_pieces(
        target.ctypes.data,
        source.ctypes.data,
        target_ids.ctypes.data,
        source_ids.ctypes.data,
        len(target_ids),
        target.shape[1],
        offsets.ctypes.data,
        lengths.ctypes.data,
        len(offsets),
        None if cancel is None else cancel.ctypes.data,
    )
    return done


def checksum_blocks(blocks: Blocks, ids: Ids) -> NDArray[np.uint64]:
    """uint64 [n]: the checksum of each of the blocks named. Raises ProtocolError for ids outside the pool."""
    _check_blocks(blocks)
    ids = check_ids(ids, len(blocks), "our")
    lib = library()
    if lib is None:
        return fallback.checksum_blocks(blocks, ids)
    sums = np.empty(len(ids), dtype=np.uint64)
    lib.diptych_checksum_blocks(blocks.ctypes.data, ids.ctypes.data, len(ids), blocks.shape[1], sums.ctypes.data)
    return sums


def _check_blocks(blocks: Blocks) -> None:
    if blocks.dtype != np.uint8 or blocks.ndim != 2 or blocks.shape[1] % 8 or not blocks.flags.c_contiguous:
        raise ValueError(f"blocks must be contiguous uint8 [num_blocks, 8 * k], not {blocks.dtype} {blocks.shape}")


def _check_pair(target: Blocks, source: Blocks, target_ids: Ids, source_ids: Ids) -> tuple[Ids, Ids]:
    _check_blocks(target)
    _check_blocks(source)
    if not target.flags.writeable or target.shape[1] != source.shape[1]:
        raise ValueError(f"cannot copy blocks of {source.shape[1]} bytes into {target.shape[1]} (or read-only) ones")
    target_ids = check_ids(target_ids, len(target), "target")
    source_ids = check_ids(source_ids, len(source), "source")
    if len(target_ids) != len(source_ids):
        raise ProtocolError(f"{len(source_ids)} source blocks for {len(target_ids)} target blocks")
    return target_ids, source_ids
