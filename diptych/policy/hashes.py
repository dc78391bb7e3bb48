"""Chained block hashes: what makes two prompts share KV blocks.

blake2b-128 over token ids, each block's hash keyed by the one before it, the first by a salt that names model, layout
and tenant. Drivers compute them; policy objects only compare them. Not responsible for looking blocks up (`blocks.py`).
"""

from array import array
from collections.abc import Sequence
from hashlib import blake2b

HASH_BYTES = 16


def root(*salt: str) -> bytes:
    """The hash before the first block, from whatever must not be shared across (model, layout, tenant)."""
    return blake2b("\0".join(salt).encode(), digest_size=HASH_BYTES).digest()


def chain(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The hash of one full block of token ids that follows `parent`."""
    return blake2b(array("i", tokens).tobytes(), digest_size=HASH_BYTES, key=parent).digest()


def block_hashes(tokens: Sequence[int], block_size: int, parent: bytes) -> tuple[bytes, ...]:
    """The hashes of every full block of `tokens`, in order."""
    hashes = []
    for start in range(0, len(tokens) - len(tokens) % block_size, block_size):
        parent = chain(parent, tokens[start : start + block_size])
        hashes.append(parent)
    return tuple(hashes)
