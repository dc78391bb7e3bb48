"""Blocks of floats as int8 and back: one native call with the GIL released, or the same in numpy, bit for bit.

What an encoded block is, `codec.h` says. As in the package's `__init__`, every id and size is checked here, on every
call. Not responsible for when to encode (`transfer/codec.py`).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diptych.transfer import native
from diptych.transfer.native import fallback

DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2}
_SUMS_BYTES = 16
_MAX_BITS = 0x7FFFFFFF


@dataclass(frozen=True, slots=True)
class Rows:
    """What a block is made of: so many rows of `dim` elements, each of which gets a scale."""

    dtype: str  # one of DTYPES
    rows: int
    dim: int

    @property
    def block_bytes(self) -> int:
        """Of a block as it is."""
        return self.rows * self.dim * (4 if self.dtype == "float32" else 2)

    @property
    def used_bytes(self) -> int:
        """Of a block encoded, without the zeros at its end."""
        return _SUMS_BYTES + self.rows * (4 + self.dim)

    @property
    def encoded_bytes(self) -> int:
        """Of a block encoded."""
        return -(-self.used_bytes // 8) * 8


def encode(blocks: native.Blocks, ids: native.Ids, shape: Rows, out: native.Blocks) -> None:
    """Encode blocks by id into the first rows of `out`. Raises ProtocolError for ids outside the pool."""
    ids = native.check_ids(ids, len(blocks), "their")
    _check(blocks, shape, out, len(ids))
    lib = native.library()
    if lib is None:
        for row, block in zip(out, ids, strict=False):
            _encode(blocks[block], shape, row)
        return
    where = out.ctypes.data, out.shape[1], blocks.ctypes.data, ids.ctypes.data, len(ids), blocks.shape[1]
    lib.diptych_encode_int8(*where, DTYPES[shape.dtype], shape.rows, shape.dim)


def decode(
    encoded: native.Blocks,
    blocks: native.Blocks,
    ids: native.Ids,
    shape: Rows,
    sums: NDArray[np.uint64] | None = None,
    cancel: native.Flag | None = None,
) -> int:
    """Decode into blocks by id; returns how many were done before one was damaged, or `cancel` was seen.

    sums: uint64 [n], filled with the checksums of the blocks as they were at the source; None to do without.
    """
    ids = native.check_ids(ids, len(blocks), "our")
    _check(blocks, shape, encoded, len(ids))
    lib = native.library()
    if lib is None:
        return _decode_all(encoded, blocks, ids, shape, sums, cancel)
    where = encoded.ctypes.data, encoded.shape[1], blocks.ctypes.data, ids.ctypes.data, len(ids), blocks.shape[1]
    done: int = lib.diptych_decode_int8(
        *where,
        DTYPES[shape.dtype],
        shape.rows,
        shape.dim,
        None if sums is None else sums.ctypes.data,
        None if cancel is None else cancel.ctypes.data,
    )
    return done


def _check(blocks: native.Blocks, shape: Rows, encoded: native.Blocks, count: int) -> None:
    for name, array, width in (("blocks", blocks, shape.block_bytes), ("encoded", encoded, shape.encoded_bytes)):
        if array.dtype != np.uint8 or array.ndim != 2 or array.shape[1] != width or not array.flags.c_contiguous:
            raise ValueError(f"{name} must be contiguous uint8 [n, {width}], not {array.dtype} {array.shape}")
    if len(encoded) < count:
        raise ValueError(f"{count} blocks do not fit into {len(encoded)}")


def _sum(row: NDArray[np.uint8]) -> NDArray[np.uint64]:
    return fallback.checksum_blocks(row.reshape(1, -1), np.zeros(1, np.int32))


def _encode(block: NDArray[np.uint8], shape: Rows, out: NDArray[np.uint8]) -> None:
    values = _widen(block, shape.dtype).reshape(shape.rows, shape.dim)
    peak = (values.view(np.uint32) & _MAX_BITS).max(axis=1).view(np.float32)
    with np.errstate(all="ignore"):
        factor = np.where(peak > 0, np.float32(127) / peak, np.float32(0))
        scaled = np.rint(values * factor[:, None])
        small = np.where(np.isfinite(scaled), scaled, 0).astype(np.int8)
    at = _SUMS_BYTES + 4 * shape.rows
    out[_SUMS_BYTES:at] = (peak / np.float32(127)).view(np.uint8)
    out[at : shape.used_bytes] = small.view(np.uint8).reshape(-1)
    out[shape.used_bytes :] = 0
    out[8:16] = _sum(block).view(np.uint8)
    out[:8] = _sum(out[8:]).view(np.uint8)


def _decode_all(
    encoded: native.Blocks,
    blocks: native.Blocks,
    ids: native.Ids,
    shape: Rows,
    sums: NDArray[np.uint64] | None,
    cancel: native.Flag | None,
) -> int:
    for i, (row, block) in enumerate(zip(encoded, ids, strict=False)):
        if (cancel is not None and cancel[0]) or (_sum(row[8:]).view(np.uint8) != row[:8]).any():
            return i
        if sums is not None:
            sums[i : i + 1] = row[8:16].view(np.uint64)
        at = _SUMS_BYTES + 4 * shape.rows
        values = row[at : shape.used_bytes].view(np.int8).reshape(shape.rows, shape.dim)
        with np.errstate(all="ignore"):
            wide = values.astype(np.float32) * row[_SUMS_BYTES:at].view(np.float32)[:, None]
        blocks[block] = _narrow(wide.reshape(-1), shape.dtype).view(np.uint8)
    return len(ids)


def _widen(block: NDArray[np.uint8], dtype: str) -> NDArray[np.float32]:
    if dtype == "float32":
        return block.view(np.float32)
    if dtype == "float16":
        return block.view(np.float16).astype(np.float32)
    return (block.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def _narrow(values: NDArray[np.float32], dtype: str) -> NDArray[np.generic]:
    if dtype == "float32":
        return values
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16)
    bits = values.view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
