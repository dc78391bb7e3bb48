"""From a plan to bytes: checks it against both pools, copies by one native call, verifies the checksums.

No event loop and no threads: whoever calls `Copy.run` lends it the thread it blocks. `read_now` is the whole way for a
driver that has none (an in-process test harness); the transports go through `reading.py`.

Not responsible for deadlines or for when target blocks may be used again.
"""

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diptych.errors import LayoutMismatch, ProtocolError, TransferError
from diptych.transfer import native
from diptych.transfer.layout import Layout, Pieces
from diptych.transfer.pool import Pool
from diptych.transfer.seam import PERMIT_BYTES, Landed, Plan, Readable, Stats

PART_BYTES = 1 << 20  # copied at once where somebody wants to hear of it


@dataclass(frozen=True, slots=True)
class Moves:
    """A plan that was checked against both pools: private copies of its ids, and which bytes of each block."""

    source_ids: native.Ids
    target_ids: native.Ids
    checksums: NDArray[np.uint64] | None
    pieces: Pieces | None  # None means whole blocks
    block_bytes: int  # of a block, what is to be moved

    @property
    def num_bytes(self) -> int:
        """Payload of the whole plan."""
        return len(self.target_ids) * self.block_bytes

    def new_sums(self) -> NDArray[np.uint64] | None:
        """Room for the checksums of what arrives, where there are any to compare with."""
        return None if self.checksums is None else np.empty(len(self.target_ids), dtype=np.uint64)

    def verify(self, sums: NDArray[np.uint64] | None) -> None:
        """Raise TransferError unless what arrived has the checksums that were promised."""
        if sums is None:
            return
        wrong = np.flatnonzero(sums != self.checksums)
        if len(wrong):
            block = int(self.source_ids[wrong[0]])
            raise TransferError(
                f"checksum differs for {len(wrong)} of {len(sums)} blocks, the first of them the peer's block {block}: "
                "it was written again after it was offered, or the offer was stale"
            )


@dataclass(frozen=True, slots=True)
class Copy:
    """A checked plan with the memory it runs over; holding it keeps both mappings alive."""

    source: native.Blocks
    target: native.Blocks
    moves: Moves
    cancel: native.Flag | None = None

    def run(self, landed: Landed | None = None) -> Stats:
        """Copy and verify; TransferError if `cancel` was set on the way or a checksum differs.

        `Stats.elapsed_s` is the time of the copy itself, without any waiting before it.
        """
        started = time.perf_counter()
        moves, sums, n = self.moves, self.moves.new_sums(), len(self.moves.target_ids)
        step = n if landed is None else max(PART_BYTES // moves.block_bytes, 1)
        for first in range(0, n, step or 1):
            part = slice(first, min(first + step, n))
            done = self._copy(part, None if sums is None else sums[part])
            if done < part.stop:
                raise TransferError(f"cancelled after {done} of {n} blocks")
            if landed is not None:
                landed((part.stop - first) * moves.block_bytes, started)
        moves.verify(sums)
        return Stats(moves.num_bytes, time.perf_counter() - started)

    def _copy(self, part: slice, sums: NDArray[np.uint64] | None) -> int:
        """Copy some blocks of the plan; returns how many of the whole are done."""
        moves = self.moves
        ids = moves.target_ids[part], moves.source_ids[part]
        if moves.pieces is None:
            return int(part.start) + native.copy_blocks(self.target, self.source, *ids, sums, self.cancel)
        return int(part.start) + native.copy_pieces(self.target, self.source, *ids, moves.pieces, self.cancel)


def prepare(
    source: Pool, target: Pool, plan: Plan, cancel: native.Flag | None = None, readable: Readable | None = None
) -> Copy:
    """Check a plan against both pools, and its permit, where there is somebody to judge it.

    Raises what `check` does, LayoutMismatch for pools that differ, TransferError where the permit is not good.
    """
    if source.layout != target.layout:
        target.layout.check(source.layout)
    moves = check(source.num_blocks, target, plan)
    if readable is not None and not readable(plan.permit, moves.source_ids.tolist()):
        raise refusal("the peer")
    return Copy(source.view, target.view, moves, cancel)


def refusal(name: str) -> TransferError:
    """What a read fails with whose permit is not good for its blocks."""
    return TransferError(f"{name} refused: it does not offer these blocks by this permit (any more)")


def check(num_blocks: int, target: Pool, plan: Plan) -> Moves:
    """Check a plan against our pool and a peer's of `num_blocks`. The ids are copied: the plan's arrays may change.

    Raises ProtocolError for ids outside a pool, lists of unequal length, a target block named twice, impossible
    ranges, checksums for parts of blocks or a permit that is none.
    """
    if len(plan.permit) != PERMIT_BYTES:
        raise ProtocolError(f"a permit has {PERMIT_BYTES} bytes, not {len(plan.permit)}")
    source_ids = native.check_ids(plan.source, num_blocks, "source")
    target_ids = native.check_ids(plan.target, target.num_blocks, "target")
    n = len(target_ids)
    if len(source_ids) != n:
        raise ProtocolError(f"{len(source_ids)} source blocks for {n} target blocks")
    if len(np.unique(target_ids)) != n:
        raise ProtocolError("the plan writes a target block twice")
    pieces = _pieces(target.layout, plan)
    block_bytes = target.layout.block_bytes if pieces is None else sum(length for _, length in pieces)
    return Moves(source_ids, target_ids, _checksums(plan, n, pieces), pieces, block_bytes)


def read_now(source: Pool, target: Pool, plan: Plan, readable: Readable | None = None) -> Stats:
    """Read synchronously, verified. Raises what `prepare` and `Copy.run` raise."""
    return prepare(source, target, plan, readable=readable).run()


def checksum(pool: Pool, blocks: NDArray[np.int32]) -> NDArray[np.uint64]:
    """uint64 [n]: the checksums that a peer's plan over these blocks should carry."""
    return native.checksum_blocks(pool.view, blocks)


def _pieces(layout: Layout, plan: Plan) -> Pieces | None:
    if plan.layers is None and plan.heads is None:
        return None
    if len(layout.groups) != 1:
        raise LayoutMismatch(f"layer and head ranges need a cache of one group of layers; this is {layout.card()}")
    return layout.pieces(plan.layers, plan.heads)


def _checksums(plan: Plan, n: int, pieces: Pieces | None) -> NDArray[np.uint64] | None:
    if plan.checksums is None:
        return None
    if pieces is not None:
        raise ProtocolError("checksums cover whole blocks; a plan for parts of blocks cannot be verified by them")
    sums = np.array(plan.checksums)
    if sums.shape != (n,) or (n and sums.dtype.kind not in "iu"):
        raise ProtocolError(f"{n} blocks need {n} integer checksums, not {sums.dtype} {sums.shape}")
    return sums.astype(np.uint64)
