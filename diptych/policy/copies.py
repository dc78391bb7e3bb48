"""What the decode side lets the prefill side read back: blocks of the answer, as they fill.

Each batch of blocks is held, and stays as it is, until the reader has it (`Replicated`), wants no more (`Drop`), is
gone (`PeerLost`) or has been silent for a lease; so what is read outlives the sequence it is of, but not for long.

Not responsible for what the reader does with them (`keep.py`).
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from diptych.policy.blocks import BlockPool
from diptych.policy.retention import Replicate
from diptych.policy.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Batch:
    """Blocks that a peer may read, and until when. `end`: so many blocks has the sequence up to the last of them."""

    peer: str
    blocks: tuple[int, ...]
    end: int
    until: float


class Copies:
    """All batches of one worker, by attempt, oldest first."""

    def __init__(self, pool: BlockPool, lease_s: float):
        self._pool = pool
        self._lease_s = lease_s
        self._open: dict[int, deque[Batch]] = {}
        self._leases: deque[tuple[float, int]] = deque()  # (until, rid), in order; entries may be stale

    @property
    def rids(self) -> set[int]:
        """Attempts of which blocks may be read."""
        return set(self._open)

    def is_empty(self) -> bool:
        """Nobody may read anything here."""
        return not self._open

    def next_deadline(self) -> float | None:
        """When the oldest lease ends."""
        while self._leases and not self._ends(*self._leases[0]):
            self._leases.popleft()
        return self._leases[0][0] if self._leases else None

    def reader(self, rid: int) -> str:
        """The peer that may read blocks of an attempt; "" where none may."""
        batches = self._open.get(rid)
        return batches[0].peer if batches else ""

    def covers(self, rid: int, blocks: Iterable[int]) -> bool:
        """A peer may read these now, by the batches of that attempt that are open.

        Another thread may call it while this one works: it looks once into the dict, and at a copy of what it finds.
        """
        batches = tuple(self._open.get(rid, ()))
        return bool(batches) and {block for batch in batches for block in batch.blocks}.issuperset(blocks)

    def copy(self, seq: Sequence, now: float) -> list[Replicate]:
        """Offer the blocks that became full since the last time."""
        first = seq.copied
        if first is None or not seq.keeper or seq.sealed <= first:
            return []
        blocks = tuple(seq.blocks[first : seq.sealed])
        self._pool.share(blocks)
        self._pool.offer(blocks)
        self._open.setdefault(seq.rid, deque()).append(Batch(seq.keeper, blocks, seq.sealed, now + self._lease_s))
        self._leases.append((now + self._lease_s, seq.rid))
        seq.copied = seq.sealed
        return [Replicate(seq.keeper, seq.rid, first, blocks, tuple(seq.hashes[first : seq.sealed]))]

    def copied(self, rid: int, num_blocks: int) -> None:
        """The reader has that many leading blocks of the sequence; said twice, it means the same."""
        batches = self._open.get(rid)
        while batches and batches[0].end <= num_blocks:
            self._close(batches.popleft())
        if batches is not None and not batches:
            del self._open[rid]

    def stop(self, rid: int) -> None:
        """The reader wants no more of an attempt."""
        for batch in self._open.pop(rid, ()):
            self._close(batch)

    def lose(self, peer: str) -> None:
        """A reader is gone."""
        for rid in [rid for rid, batches in self._open.items() if batches[0].peer == peer]:
            self.stop(rid)

    def expire(self, now: float) -> list[int]:
        """End the leases that are over; returns the attempts, of which nothing more is to be copied."""
        over = []
        while self._leases and self._leases[0][0] <= now:
            until, rid = self._leases.popleft()
            if self._ends(until, rid):
                self.stop(rid)
                over.append(rid)
        return over

    def _ends(self, until: float, rid: int) -> bool:
        """That lease is of a batch that is still open."""
        return rid in self._open and self._open[rid][0].until <= until

    def _close(self, batch: Batch) -> None:
        self._pool.withdraw(batch.blocks)
        self._pool.release(batch.blocks)
