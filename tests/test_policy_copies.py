"""Blocks of an answer that may be read back: which, until when, and asked about by another thread.

What becomes of copies in the life of a request is in `test_policy_keep.py` and `test_serve_permits.py`.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

from diptych.policy.blocks import BlockPool
from diptych.policy.copies import Copies
from diptych.policy.messages import Place, Role
from diptych.policy.sequence import Sequence

RID = 64


def offering(num_batches: int) -> tuple[Copies, Sequence]:
    """Batches of one block each, 0, 1, ... of a sequence whose keeper is p0."""
    pool = BlockPool(10, 4)
    copies, seq = Copies(pool, 30.0), Sequence(Place("d0", RID, Role.DECODE, "p0", 4, 4, 40, (), 0, 0), 0.0)
    seq.keeper, seq.copied, seq.blocks = "p0", 0, pool.take(10)
    seq.hashes = [bytes([block]) * 16 for block in range(10)]
    for _ in range(num_batches):
        seq.sealed += 1
        copies.copy(seq, 0.0)
    return copies, seq


def test_they_cover_what_is_open_until_the_reader_has_it_or_the_lease_ends() -> None:
    copies, _ = offering(4)
    assert copies.covers(RID, [0, 3, 1]) and not copies.covers(RID, [3, 4]) and not copies.covers(RID + 1, [0])
    copies.copied(RID, 2)
    assert copies.covers(RID, [2, 3]) and not copies.covers(RID, [1, 2])
    copies.expire(30.0)
    assert not copies.covers(RID, [3]) and not copies.covers(RID, [])


class Meanwhile(tuple[int, ...]):
    """Blocks of a batch: whenever somebody looks at them, something else happens first."""

    happens: Callable[[], object]

    def __iter__(self) -> Iterator[int]:
        self.happens()
        return super().__iter__()


def test_asking_while_policy_goes_on_is_harmless() -> None:
    """As another thread may, between any two steps of the question: what was open when it came is what counts."""
    copies, seq = offering(3)

    def happens() -> None:
        if RID in copies.rids:
            seq.sealed += 1
            copies.copy(seq, 0.0)
            copies._open[RID].popleft()

    batch = copies._open[RID][0]
    blocks = Meanwhile(batch.blocks)
    blocks.happens = happens
    copies._open[RID][0] = replace(batch, blocks=blocks)
    assert copies.covers(RID, [0, 1, 2])
    assert not copies.covers(RID, [0]) and copies.covers(RID, [3])
    blocks.happens = lambda: copies._open.pop(RID, None)
    copies._open[RID].appendleft(replace(batch, blocks=blocks))
    assert copies.covers(RID, [3]) and not copies.covers(RID, [3])
