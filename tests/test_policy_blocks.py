"""The block pool against an oracle that only keeps lists."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from diptych.policy.blocks import BlockPool

NUM_BLOCKS = 6


class PoolMachine(RuleBasedStateMachine):
    """Users take, share, offer and give back blocks in any order; what they hold is kept in plain lists."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS, 4)
        self.users: list[list[int]] = []  # blocks of each user
        self.reads: list[list[int]] = []  # blocks of each user whose read is under way
        self.fenced: list[list[int]] = []  # quarantined together
        self.offered: list[list[int]] = []
        self.hashes: dict[bytes, int] = {}
        self.cached: list[int] = []  # least recently used first
        self.next_hash = 0

    def held(self, block: int) -> int:
        return sum(user.count(block) for user in (*self.users, *self.reads))

    @rule(count=st.integers(0, NUM_BLOCKS), reserved=st.booleans())
    def take(self, count: int, reserved: bool) -> None:
        if count > self.pool.num_available:
            with pytest.raises(IndexError):
                self.pool.take(count)
            return
        num_free = self.pool.counts()["free"]
        evicted = self.cached[: max(count - num_free, 0)]
        blocks = self.pool.take(count, reserved)
        assert all(self.held(block) == 0 for block in blocks) and len(set(blocks)) == count
        assert not set(blocks) & {block for group in self.fenced for block in group}
        assert set(evicted) == set(blocks) & set(self.cached), "the least recently used go, and only when none is free"
        self.cached = [block for block in self.cached if block not in evicted]
        self.hashes = {digest: block for digest, block in self.hashes.items() if block not in evicted}
        (self.reads if reserved else self.users).append(blocks)

    @precondition(lambda self: self.reads)
    @rule(which=st.integers(0, 99))
    def arrive(self, which: int) -> None:
        blocks = self.reads.pop(which % len(self.reads))
        self.pool.arrive(blocks)
        self.users.append(blocks)

    @precondition(lambda self: self.reads)
    @rule(which=st.integers(0, 99))
    def quarantine(self, which: int) -> None:
        blocks = self.reads.pop(which % len(self.reads))
        self.pool.quarantine(blocks)
        self.fenced.append(blocks)

    @precondition(lambda self: self.fenced)
    @rule(which=st.integers(0, 99))
    def settle(self, which: int) -> None:
        self.pool.settle(self.fenced.pop(which % len(self.fenced)))

    @precondition(lambda self: any(self.users))
    @rule(which=st.integers(0, 99), collide=st.booleans())
    def seal(self, which: int, collide: bool) -> None:
        blocks = [block for user in self.users for block in user]
        block = blocks[which % len(blocks)]
        self.next_hash += not (collide and self.hashes)
        digest = self.next_hash.to_bytes(16, "big")
        self.pool.seal(block, digest)
        if digest not in self.hashes and block not in self.hashes.values():
            self.hashes[digest] = block

    @precondition(lambda self: self.hashes)
    @rule(which=st.integers(0, 99))
    def share(self, which: int) -> None:
        digest = list(self.hashes)[which % len(self.hashes)]
        block = self.hashes[digest]
        assert self.pool.match([digest]) == [block]
        assert self.pool.is_idle(block) == (block in self.cached)
        self.pool.share([block])
        self.cached = [other for other in self.cached if other != block]
        self.users.append([block])

    @precondition(lambda self: self.users)
    @rule(which=st.integers(0, 99))
    def offer(self, which: int) -> None:
        blocks = self.users[which % len(self.users)]
        self.pool.offer(blocks)
        self.offered.append(list(blocks))
        self.users.append([])  # whoever offers keeps its blocks until the offer is withdrawn

    @precondition(lambda self: self.offered)
    @rule(which=st.integers(0, 99))
    def withdraw(self, which: int) -> None:
        self.pool.withdraw(self.offered.pop(which % len(self.offered)))

    @precondition(lambda self: self.users)
    @rule(which=st.integers(0, 99))
    def release(self, which: int) -> None:
        blocks = self.users[which % len(self.users)]
        if any(set(blocks) & set(offer) for offer in self.offered):
            return
        self.users.remove(blocks)
        self.pool.release(blocks)
        for block in blocks:
            if self.held(block) == 0 and block in self.hashes.values():
                self.cached.append(block)

    @invariant()
    def adds_up(self) -> None:
        self.pool.check()
        assert self.pool.balanced()
        fenced = {block for group in self.fenced for block in group}
        idle = [block for block in range(NUM_BLOCKS) if self.held(block) == 0 and block not in fenced]
        counts = self.pool.counts()
        assert self.pool.num_available == len(idle)
        assert counts["quarantined"] == len(fenced) == self.pool.num_quarantined
        assert counts["reserved"] == sum(map(len, self.reads))
        assert counts["offered"] == len({block for offer in self.offered for block in offer})
        assert counts["cached"] == len(self.cached)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_a_prefix_is_found_up_to_the_first_unknown_block() -> None:
    pool = BlockPool(4, 16)
    blocks = pool.take(3)
    for block, digest in zip(blocks, (b"a", b"b", b"c"), strict=True):
        pool.seal(block, digest)
    assert pool.match([b"a", b"b", b"x", b"c"]) == blocks[:2]
    pool.release(reversed(blocks))
    pool.take(2)  # the free one, and the cached one that was released first: the end of the prefix
    assert pool.match([b"a", b"b", b"c"]) == blocks[:2]


def test_blocks_for_rounds_up() -> None:
    pool = BlockPool(1, 16)
    assert [pool.blocks_for(n) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]
