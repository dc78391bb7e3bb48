"""The same copies and checksums in numpy, for machines without a compiler and as the oracle of the tests.

Agrees with `copy.cpp` bit for bit; see there for what the checksum is. Arguments were checked by `native/__init__.py`.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]

_LANES = 8
_LOW = np.uint64(0xFFFFFFFF)
_P1, _P2, _P3, _P4, _P5 = np.array(
    [0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5],
    dtype=np.uint64,
)


def copy_blocks(
    target: NDArray[np.uint8],
    source: NDArray[np.uint8],
    target_ids: NDArray[np.int32],
    source_ids: NDArray[np.int32],
    sums: Words | None,
    cancel: NDArray[np.int32] | None,
) -> int:
    """As `native.copy_blocks`. Sums what was written, not what was read: the source may change in between."""
    for i, (to, origin) in enumerate(zip(target_ids, source_ids, strict=True)):
        if cancel is not None and cancel[0]:
            return i
        target[to] = source[origin]
        if sums is not None:
            sums[i : i + 1] = checksum_blocks(target, target_ids[i : i + 1])
    return len(target_ids)


def copy_pieces(
    target: NDArray[np.uint8],
    source: NDArray[np.uint8],
    target_ids: NDArray[np.int32],
    source_ids: NDArray[np.int32],
    pieces: Sequence[tuple[int, int]],
    cancel: NDArray[np.int32] | None,
) -> int:
    """As `native.copy_pieces`."""
    for i, (to, origin) in enumerate(zip(target_ids, source_ids, strict=True)):
        if cancel is not None and cancel[0]:
            return i
        for offset, length in pieces:
            target[to, offset : offset + length] = source[origin, offset : offset + length]
    return len(target_ids)


def checksum_blocks(blocks: NDArray[np.uint8], ids: NDArray[np.int32]) -> Words:
    """As `native.checksum_blocks`. One block at a time, so that temporaries stay small."""
    accumulators = np.empty((len(ids), 2 * _LANES), dtype=np.uint64)
    for i, block in enumerate(ids):
        accumulators[i] = _accumulate(blocks[block].view(np.uint64))
    return _fold(accumulators, blocks.shape[1])


@lru_cache(maxsize=4)
def _keys(rows: int) -> Words:
    lanes = _P4 * np.arange(1, 2 * _LANES, 2, dtype=np.uint64)
    keys: Words = lanes + _P2 * np.arange(rows, dtype=np.uint64)[:, None]
    return keys


def _accumulate(words: Words) -> Words:
    """[16]: the products of all eight lanes, then their plain sums."""
    tail = -len(words) % _LANES
    if tail:
        words = np.concatenate([words, np.zeros(tail, dtype=np.uint64)])
    rows = words.reshape(-1, _LANES)
    mixed = rows ^ _keys(len(rows))
    products = (mixed & _LOW) * (mixed >> np.uint64(32))
    return np.concatenate([products.sum(axis=0, dtype=np.uint64), rows.sum(axis=0, dtype=np.uint64)])


def _fold(accumulators: Words, num_bytes: int) -> Words:
    h = np.full(len(accumulators), num_bytes, dtype=np.uint64) * _P1 + _P5
    for column in accumulators.T:
        h ^= column * _P2
        h = ((h << np.uint64(31)) | (h >> np.uint64(33))) * _P1
    h = (h ^ (h >> np.uint64(33))) * _P2
    h = (h ^ (h >> np.uint64(29))) * _P3
    return np.asarray(h ^ (h >> np.uint64(32)), dtype=np.uint64)
