"""A model that only pretends to compute, over KV bytes that are real: no torch, slept time, provable answers.

Every token leaves deterministic bytes in the paged pool. The next token is a hash of all KV of the sequence, re-read
from the pool through its block table: a lost, stale, misplaced or corrupted page changes the answer. `oracle` says
what the answer must be without any pool, so equal tokens prove that the KV arrived whole. Sampling parameters other
than stop ids are ignored. Not responsible for predicting anyone's hardware: the step cost is what it is told.
"""

import time
from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from diptych.engine.executor import Result, Sampling
from diptych.engine.sequence import InOrder, Launch, Piece, SequenceTable
from diptych.errors import ConfigError
from diptych.policy.messages import Run
from diptych.transfer.layout import Layout
from diptych.transfer.pool import Pool

Bytes = NDArray[np.uint8]
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
VECTOR_WIDTH = 16  # numbers in an embedding: as many as a hash has


@dataclass(frozen=True, slots=True)
class PacedModel:
    """Seconds of a step: `base_s`, `new_token_s` for each new token, `context_token_s` for each token attended to."""

    base_s: float = 0.0
    new_token_s: float = 0.0
    context_token_s: float = 0.0
    kv_bytes_per_token: int = 64
    vocab: int = 32000

    def __post_init__(self) -> None:
        if self.kv_bytes_per_token < 8 or self.kv_bytes_per_token % 8:
            raise ConfigError(f"kv_bytes_per_token is {self.kv_bytes_per_token}; it must be a multiple of 8")

    def cost_s(self, new_tokens: int, context_tokens: int) -> float:
        """Seconds that a step takes."""
        return self.base_s + self.new_token_s * new_tokens + self.context_token_s * context_tokens


def paced_layout(model: PacedModel, block_size: int) -> Layout:
    """The pool layout of a paced model: one layer, one head, uint8, half of a token's bytes as K and half as V."""
    name = f"paced-{model.kv_bytes_per_token}-{model.vocab}"
    dim = model.kv_bytes_per_token // 2
    return Layout.uniform(layers=1, kv_heads=1, head_dim=dim, block_size=block_size, dtype="uint8", model=name)


class PacedExecutor:
    """An `Executor` that writes and reads real pages and sleeps for the rest of each step's cost."""

    def __init__(self, model: PacedModel, pool: Pool) -> None:
        self.model = model
        self.pool = pool
        block_size = pool.layout.block_size
        wanted = paced_layout(model, block_size)
        if pool.layout.shape != wanted.shape or pool.layout.dtype != wanted.dtype:
            raise ConfigError(f"this pool is not a paced model's: it has {pool.layout.card()}, not {wanted.card()}")
        # [block, K/V, token, dim]: one layer and one head leave no axes of their own
        self._pages: Bytes = pool.view.reshape(pool.num_blocks, 2, block_size, -1)
        self._sequences = SequenceTable(block_size)
        self._steps = InOrder(self._compute)
        self._busy_until_s = 0.0

    def admit(self, rid: int, tokens: list[int], num_prompt: int, sampling: Sampling) -> None:
        """Make a sequence known."""
        self._sequences.admit(rid, tokens, num_prompt, sampling)

    def extend(self, rid: int, tokens: list[int]) -> None:
        """Append token ids computed elsewhere."""
        self._sequences.extend(rid, tokens)

    def tokens(self, rid: int) -> list[int]:
        """All token ids known of a sequence (the live list)."""
        return self._sequences.tokens(rid)

    def forget(self, rid: int) -> None:
        """Drop a sequence."""
        self._sequences.forget(rid)

    def truncate(self, rid: int, num_tokens: int) -> None:
        """Keep only the first `num_tokens` ids."""
        self._sequences.truncate(rid, num_tokens)

    def launch(self, step: Run) -> Launch:
        """Note the start of a step; its bytes are written and its time is slept in `collect`."""
        return self._steps.add(Launch(self._sequences.take(step), time.monotonic()))

    def collect(self, handle: Launch) -> Result:
        """Write the step's KV, hash what its sampled tokens need, sleep until the step's time is over."""
        return self._steps.finish(handle)

    def _compute(self, launch: Launch) -> Result:
        # One device: a step begins when it was launched, or when the one before it is over.
        begin_s = max(launch.begin_s, self._busy_until_s)
        for piece in launch.pieces:
            self._write(piece)
        ends = [piece for piece in launch.pieces if piece.sample]
        vectors = {p.rid: self._vector(p) for p in ends if p.sequence.sampling.pooling}
        sampled = [self._sample(piece) for piece in ends if piece.rid not in vectors]
        new_tokens = sum(piece.count for piece in launch.pieces)
        due_s = begin_s + self.model.cost_s(new_tokens, sum(piece.end for piece in launch.pieces))
        time.sleep(max(0.0, due_s - time.monotonic()))
        self._busy_until_s = time.monotonic()
        return Result(sampled, self._busy_until_s - begin_s, vectors=vectors)

    def _write(self, piece: Piece) -> None:
        """Put the KV of a slice's tokens where its block table says."""
        positions = np.arange(piece.start, piece.end)
        block_size = self._pages.shape[2]
        kv = content(piece.token_ids(), piece.start, self.model.kv_bytes_per_token)
        halves = kv.reshape(piece.count, 2, -1)
        self._pages[piece.blocks[positions // block_size], :, positions % block_size] = halves

    def _sample(self, piece: Piece) -> tuple[int, int, bool]:
        """Re-read every page of a sequence and hash it into the next token."""
        token = _next_token(*self._digests(piece), piece.end, self.model.vocab)
        return piece.rid, token, piece.sequence.append_sampled(token)

    def _vector(self, piece: Piece) -> bytes:
        """Re-read every page of a sequence and hash it into a vector."""
        return _vector_of(*self._digests(piece), piece.end, piece.sequence.sampling.pooling)

    def _digests(self, piece: Piece) -> tuple[bytes, bytes]:
        """Of all K and of all V. Gathering them apart gives each in position order, whatever the blocks."""
        keys, values = (
            self._pages[piece.blocks, half].reshape(-1)[: piece.end * self._pages.shape[3]] for half in (0, 1)
        )
        return blake2b(keys).digest(), blake2b(values).digest()


def content(tokens: Tokens[int], start: int, kv_bytes: int) -> Bytes:
    """The KV that tokens at positions `start ...` leave: uint8 [len(tokens), kv_bytes], K in the first half.

    Eight bytes at a time: splitmix64's finalizer (Steele, Lea, Flood, OOPSLA 2014) of (token, position, word index).
    """
    words = np.arange(kv_bytes // 8, dtype=np.uint64)
    token = np.asarray(tokens, np.uint64)[:, None]
    position = np.arange(start, start + len(tokens), dtype=np.uint64)[:, None]
    x = _mix(_mix(token * _GOLDEN + position) + words * _GOLDEN)
    return x.astype("<u8", copy=False).view(np.uint8)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x + _GOLDEN).astype(np.uint64, copy=False)
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def _next_token(keys: bytes, values: bytes, position: int, vocab: int) -> int:
    """blake2b-64 of the digests of all K and all V, and the position the token will have, modulo the vocabulary."""
    digest = blake2b(keys + values + position.to_bytes(8, "little"), digest_size=8).digest()
    return int.from_bytes(digest, "little") % vocab


def _vector_of(keys: bytes, values: bytes, num_tokens: int, pooling: str) -> bytes:
    """blake2b of the same and of the way of pooling, as VECTOR_WIDTH float32 in [-1, 1)."""
    digest = blake2b(keys + values + num_tokens.to_bytes(8, "little") + pooling.encode()).digest()
    return (np.frombuffer(digest, "<i4") / np.float32(2**31)).astype("<f4").tobytes()


def vector_oracle(prompt: Tokens[int], model: PacedModel, pooling: str = "last") -> bytes:
    """The vector a paced model must make of a prompt, from token ids alone."""
    dim = model.kv_bytes_per_token // 2
    kv = content(prompt, 0, model.kv_bytes_per_token)
    digests = blake2b(kv[:, :dim].tobytes()).digest(), blake2b(kv[:, dim:].tobytes()).digest()
    return _vector_of(*digests, len(prompt), pooling)


def oracle(
    prompt: Tokens[int], num_new: int, model: PacedModel, stop_ids: tuple[int, ...] = (), min_new: int = 0
) -> list[int]:
    """The tokens a paced model must write after `prompt`, from token ids alone: no pool, no blocks, no slices.

    Digests grow by one token's bytes at a time, so a long answer costs no more per token than a short one.
    """
    dim = model.kv_bytes_per_token // 2
    keys, values = blake2b(), blake2b()
    fresh, position, written = list(prompt), 0, list[int]()
    while len(written) < num_new:
        kv = content(fresh, position, model.kv_bytes_per_token)
        keys.update(kv[:, :dim].tobytes())
        values.update(kv[:, dim:].tobytes())
        position += len(fresh)
        fresh = [_next_token(keys.digest(), values.digest(), position, model.vocab)]
        written += fresh
        if fresh[0] in stop_ids and len(written) >= min_new:
            break
    return written
