"""What an executor remembers of its sequences: token ids, how to sample, and where the KV lies.

Shared by the torch and the paced executor, so that both read a `Run` alike. Imports no torch. Not responsible for
which blocks a sequence gets (policy), nor for their bytes.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diptych.engine.executor import Result, Sampling
from diptych.engine.grammar import Matcher
from diptych.policy.messages import Run, Slice


class BlockTable:
    """A growing int32 array of block ids. Appending costs amortised O(1), reading a prefix nothing."""

    __slots__ = ("_ids", "_len")

    def __init__(self) -> None:
        self._ids = np.empty(16, np.int32)
        self._len = 0

    def __len__(self) -> int:
        return self._len

    def append(self, blocks: tuple[int, ...]) -> None:
        """Add blocks at the end."""
        end = self._len + len(blocks)
        if end > len(self._ids):
            grown = np.empty(max(end, 2 * len(self._ids)), np.int32)
            grown[: self._len] = self._ids[: self._len]
            self._ids = grown
        self._ids[self._len : end] = blocks
        self._len = end

    def prefix(self, count: int) -> NDArray[np.int32]:
        """The first `count` ids, int32 [count]: a view that later appends leave as it is."""
        return self._ids[:count]


@dataclass(slots=True)
class Sequence:
    """One sequence. `num_computed` counts the tokens whose KV a launched step has written, or will have."""

    tokens: list[int]
    num_prompt: int
    sampling: Sampling
    table: BlockTable = field(default_factory=BlockTable)
    num_computed: int = 0
    matcher: Matcher | None = None  # where its answer stands in its grammar; made when it is first asked
    pooled: Any = None  # the sum of the hidden states so far, where their mean is wanted
    num_pooled: int = 0  # of so many tokens

    def append_sampled(self, token: int) -> bool:
        """Take a sampled token; True where it ends the sequence: a stop id, and `min_new` tokens were written.

        Before that a grammar alone has one written: where it is at its end (`shaping.py`).
        """
        self.tokens.append(token)
        how, num_new = self.sampling, len(self.tokens) - self.num_prompt
        return token in how.stop_ids and (num_new >= how.min_new or bool(how.grammar))


@dataclass(frozen=True, slots=True)
class Piece:
    """A slice as it was launched: `blocks` is what the table was then, so later admits cannot bend it."""

    rid: int
    sequence: Sequence
    start: int
    count: int
    blocks: NDArray[np.int32]
    sample: bool

    @property
    def end(self) -> int:
        """Tokens of the sequence that have KV once this is computed."""
        return self.start + self.count

    def token_ids(self) -> list[int]:
        """The ids to compute, read late: the last of them may be what an earlier step in flight samples."""
        ids = self.sequence.tokens[self.start : self.end]
        if len(ids) < self.count:
            have = len(self.sequence.tokens)
            raise RuntimeError(f"sequence {self.rid}: step needs token {self.end - 1}, but only {have} are known")
        return ids


class SequenceTable:
    """The sequences an executor was told of."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._sequences: dict[int, Sequence] = {}

    def __len__(self) -> int:
        return len(self._sequences)

    def admit(self, rid: int, tokens: list[int], num_prompt: int, sampling: Sampling) -> None:
        """Make a sequence known, or start it anew with these tokens."""
        self._sequences[rid] = Sequence(list(tokens), num_prompt, sampling)

    def extend(self, rid: int, tokens: list[int]) -> None:
        """Append token ids computed elsewhere."""
        self._sequences[rid].tokens.extend(tokens)

    def tokens(self, rid: int) -> list[int]:
        """All token ids known (the live list)."""
        return self._sequences[rid].tokens

    def forget(self, rid: int) -> None:
        """Drop a sequence; a step in flight keeps what it needs of it."""
        self._sequences.pop(rid, None)

    def truncate(self, rid: int, num_tokens: int) -> None:
        """Keep the first `num_tokens` ids. Blocks stay: the table is the policy's, and it says what it drops."""
        sequence = self._sequences[rid]
        del sequence.tokens[num_tokens:]
        sequence.num_computed = min(sequence.num_computed, num_tokens)

    def take(self, step: Run) -> list[Piece]:
        """Bring the block tables up to date with a step, and say what it computes. Cost: O(slices)."""
        return [self._take(piece) for piece in step.slices]

    def _take(self, piece: Slice) -> Piece:
        sequence = self._sequences[piece.rid]
        if piece.admit:
            sequence.table = BlockTable()
        if piece.blocks:
            sequence.table.append(piece.blocks)
        end = piece.start + piece.count
        need = -(-end // self.block_size)
        if need > len(sequence.table):
            raise RuntimeError(f"sequence {piece.rid}: step needs {need} blocks, its table has {len(sequence.table)}")
        sequence.num_computed = end
        return Piece(piece.rid, sequence, piece.start, piece.count, sequence.table.prefix(need), piece.sample)


@dataclass(slots=True, eq=False)
class Launch:
    """A launched step; what `launch` hands out. `begin_s` is a monotonic clock reading, only ever subtracted."""

    pieces: list[Piece]
    begin_s: float
    result: Result | None = None


class InOrder:
    """Steps in flight, computed when they are asked for, always in the order in which they were launched.

    Computing late keeps `launch` short, and makes "the last known token" of a step come from the one before.
    """

    def __init__(self, compute: Callable[[Launch], Result]) -> None:
        self._compute = compute
        self._waiting: deque[Launch] = deque()

    def add(self, launch: Launch) -> Launch:
        """Put a step behind those in flight."""
        self._waiting.append(launch)
        return launch

    def finish(self, launch: Launch) -> Result:
        """Compute every step up to this one, and return what this one yielded."""
        while launch.result is None:
            first = self._waiting.popleft()
            first.result = self._compute(first)
        return launch.result
