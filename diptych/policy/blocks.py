"""The block pool: which fixed-size KV blocks are whose.

Every block is in exactly one state, and the counts of the states always add up to the pool:

    free         nobody's
    held         one or more sequences on this worker use it
    reserved     a sequence uses it, and a read into it is coming or under way
    offered      a sequence uses it, and a peer may read it
    cached       nobody uses it, but its content is known by its prefix hash and may be used again (LRU)
    kept         the same, and a request that is answered elsewhere would need it back: it goes after the cached ones
    quarantined  nobody may use it: a cancelled or failed read may still write into it

Blocks are ids; which bytes they are is the transport's and the executor's business. Not responsible for who gets blocks
first (`worker.py`).
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from enum import IntEnum


class State(IntEnum):
    """The states of a block, in order of precedence."""

    FREE = 0
    HELD = 1
    RESERVED = 2
    OFFERED = 3
    CACHED = 4
    KEPT = 5
    QUARANTINED = 6


class BlockPool:
    """Reference-counted blocks with prefix sharing and least-recently-used reuse."""

    def __init__(self, num_blocks: int, block_size: int):
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._keeps: dict[bytes, int] = {}  # how many requests want the content of that hash kept
        self._by_hash: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self._refs = [0] * num_blocks
        self._offers = [0] * num_blocks
        self._state = [State.FREE] * num_blocks
        self._count = [0] * len(State)
        self._count[State.FREE] = num_blocks

    @property
    def num_available(self) -> int:
        """Blocks that `take` can give now: free ones, and those whose content is only remembered."""
        return len(self._free) + len(self._cached) + len(self._kept)

    @property
    def num_spare(self) -> int:
        """Blocks that `take` can give at no request's cost: none of what is kept."""
        return len(self._free) + len(self._cached)

    @property
    def num_quarantined(self) -> int:
        """Blocks that will be free once the last read into them has settled."""
        return self._count[State.QUARANTINED]

    def counts(self) -> dict[str, int]:
        """How many blocks are in each state."""
        return {state.name.lower(): self._count[state] for state in State}

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold that many tokens."""
        return -(-num_tokens // self.block_size)

    def match(self, hashes: Sequence[bytes]) -> list[int]:
        """The blocks of the longest known prefix; nothing is taken yet (see `share`)."""
        found = []
        for digest in hashes:
            block = self._by_hash.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def is_idle(self, block: int) -> bool:
        """Nobody uses it: taking or sharing it makes one block fewer available."""
        return self._refs[block] == 0

    def share(self, blocks: Iterable[int]) -> None:
        """One more user for each of these held, offered or cached blocks."""
        for block in blocks:
            if self._refs[block] == 0:
                del self._idle(block)[block]
            self._refs[block] += 1
            self._settle_state(block)

    def take(self, count: int, reserved: bool = False) -> list[int]:
        """That many blocks for a new user. When none is free the least recently used cached ones go, then kept ones.

        The caller has looked at `num_available`; asking for more raises IndexError.
        """
        if count > self.num_available:
            raise IndexError(f"{count} blocks asked for, {self.num_available} available")
        blocks = []
        for _ in range(count):
            block = self._free.pop() if self._free else self._evict()
            self._refs[block] = 1
            self._move(block, State.RESERVED if reserved else State.HELD)
            blocks.append(block)
        return blocks

    def release(self, blocks: Iterable[int]) -> None:
        """One user fewer; a block without users is cached if its content is known, else free."""
        for block in blocks:
            self._refs[block] -= 1
            if self._refs[block] == 0 and block in self._hash_of:
                self._idle(block)[block] = None
            elif self._refs[block] == 0:
                self._free.append(block)
            self._settle_state(block)

    def keep(self, hashes: Iterable[bytes]) -> None:
        """One more request elsewhere would need content of these hashes back; it is evicted last."""
        for digest in hashes:
            self._keeps[digest] = self._keeps.get(digest, 0) + 1
            self._move_idle(digest, self._cached, self._kept)

    def unkeep(self, hashes: Iterable[bytes]) -> None:
        """One request fewer needs it back."""
        for digest in hashes:
            self._keeps[digest] -= 1
            if self._keeps[digest] == 0:
                del self._keeps[digest]
                self._move_idle(digest, self._kept, self._cached)

    def unseal(self, digest: bytes) -> None:
        """Forget what hashes so: nobody finds it any more, and unless somebody uses it its block is free."""
        block = self._by_hash.pop(digest, None)
        if block is None:
            return
        if self._refs[block] == 0:
            del self._idle(block)[block]
            self._free.append(block)
        del self._hash_of[block]
        self._settle_state(block)

    def seal(self, block: int, digest: bytes) -> None:
        """The block is full and its content is the one that hashes so: others may find it."""
        if digest not in self._by_hash and block not in self._hash_of:
            self._by_hash[digest] = block
            self._hash_of[block] = digest

    def arrive(self, blocks: Iterable[int]) -> None:
        """The reads into these reserved blocks are over: they are held."""
        for block in blocks:
            self._move(block, State.HELD)

    def quarantine(self, blocks: Iterable[int]) -> None:
        """Their user is gone but a read may still write into them: nobody gets them until `settle`."""
        for block in blocks:
            self._refs[block] -= 1
            self._move(block, State.QUARANTINED)

    def settle(self, blocks: Iterable[int]) -> None:
        """No read can write into these quarantined blocks any more: they are free."""
        for block in blocks:
            self._free.append(block)
            self._move(block, State.FREE)

    def offer(self, blocks: Iterable[int]) -> None:
        """A peer may read these held blocks from now on."""
        for block in blocks:
            self._offers[block] += 1
            self._settle_state(block)

    def withdraw(self, blocks: Iterable[int]) -> None:
        """The peer reads them no more."""
        for block in blocks:
            self._offers[block] -= 1
            self._settle_state(block)

    def check(self) -> None:
        """Raise AssertionError unless every block is in one state and all of them add up (O(pool); for tests)."""
        assert sum(self._count) == self.num_blocks, self.counts()
        assert len(self._free) == self._count[State.FREE] and len(self._cached) == self._count[State.CACHED]
        assert len(set(self._free)) == len(self._free)
        for block, state in enumerate(self._state):
            unused = state in (State.FREE, State.CACHED, State.KEPT, State.QUARANTINED)
            assert unused == (self._refs[block] == 0), (block, state, self._refs[block])
            assert (state == State.OFFERED) == (self._offers[block] > 0), (block, state)
            assert (state == State.CACHED) == (block in self._cached), (block, state)
            assert (state == State.KEPT) == (block in self._kept), (block, state)
        assert all(self._hash_of[block] == digest for digest, block in self._by_hash.items())

    def balanced(self) -> bool:
        """The cheap form of `check`: the counts add up (O(1); `/workers` says so)."""
        return (
            sum(self._count) == self.num_blocks
            and len(self._free) == self._count[State.FREE]
            and len(self._cached) == self._count[State.CACHED]
            and len(self._kept) == self._count[State.KEPT]
        )

    def _evict(self) -> int:
        block, _ = (self._cached or self._kept).popitem(last=False)
        del self._by_hash[self._hash_of.pop(block)]
        return block

    def _idle(self, block: int) -> OrderedDict[int, None]:
        """Where a remembered block that nobody uses belongs."""
        return self._kept if self._hash_of[block] in self._keeps else self._cached

    def _move_idle(self, digest: bytes, here: OrderedDict[int, None], there: OrderedDict[int, None]) -> None:
        block = self._by_hash.get(digest)
        if block is not None and block in here:
            del here[block]
            there[block] = None
            self._settle_state(block)

    def _settle_state(self, block: int) -> None:
        """Put a block that is not reserved or quarantined into the state its counters say."""
        if self._refs[block] == 0:
            digest = self._hash_of.get(block)
            self._move(block, State.FREE if digest is None else State.KEPT if digest in self._keeps else State.CACHED)
        elif self._state[block] != State.RESERVED:
            self._move(block, State.OFFERED if self._offers[block] else State.HELD)

    def _move(self, block: int, to: State) -> None:
        self._count[self._state[block]] -= 1
        self._state[block] = to
        self._count[to] += 1
