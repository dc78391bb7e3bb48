"""What the prefill side keeps of requests that are answered elsewhere, so that a decode worker's death costs no prompt.

When a sequence is handed over its blocks go to the prefix cache, as anybody's would; but as long as the request lives
they are *kept*: evicted after everything else. Its last block, which is not full and so has no hash, is remembered
under a name of its own. Blocks of the answer follow as they fill: the decode side says `Replicate`, and they are read
back here. A later attempt at the request that is placed on this worker finds all of it, and computes only what was
written since.

    handed over --> kept --(Replicate, Pull, Read)--> kept, longer --(Release)--> cached
                      `--(PeerLost)--> kept for one lease --(Place: the next attempt)--> held

Keeping is a favour: what memory is needed for is taken (`blocks.py`), and what cannot be read is not kept. Not
responsible for offering blocks to be replicated (`copies.py`) or for choosing where a request goes on (`router.py`).
"""

from collections import deque
from dataclasses import dataclass, field
from itertools import count
from math import inf

from diptych.policy.blocks import BlockPool
from diptych.policy.messages import (
    CancelPull,
    Drop,
    Pull,
    Purpose,
    WorkerOrder,
    request_of,
)
from diptych.policy.retention import Replicate, Replicated
from diptych.policy.sequence import Sequence


@dataclass(slots=True)
class Kept:
    """One request. `hashes` are those of its full blocks; `tail` names the block behind them, if there is one."""

    rid: int
    peer: str
    hashes: list[bytes]
    tail: bytes | None
    num_tokens: int  # whose KV is in these blocks
    until: float = inf  # once its peer is gone
    waiting: list[tuple[int, bytes]] = field(default_factory=list)  # the peer's blocks that may be read
    pull: int | None = None  # the read under way
    deaf: bool = False  # takes no more: a part could not be had


@dataclass(slots=True)
class Reading:
    """A read of replicated blocks into `target`; `kept` is None once nobody wants it."""

    kept: Kept | None
    peer: str
    rid: int
    target: list[int]
    hashes: list[bytes]


class Keep:
    """Everything one worker keeps for others, by request. `pulls` numbers reads, for all of the worker's."""

    def __init__(self, pool: BlockPool, lease_s: float, pulls: "count[int]"):
        self._pool = pool
        self._lease_s = lease_s
        self._pulls = pulls
        self._kept: dict[int, Kept] = {}
        self._reads: dict[int, Reading] = {}
        self._leases: deque[tuple[float, int]] = deque()  # (until, request), in order; entries may be stale

    def __len__(self) -> int:
        return len(self._kept)

    def is_empty(self) -> bool:
        """No read of ours can touch memory here or at a peer. What is kept is no reason to stay."""
        return not self._reads

    def reads(self, pull: int) -> bool:
        """That read is one of ours."""
        return pull in self._reads

    def next_deadline(self) -> float | None:
        """When the next lease of a request whose peer is gone ends."""
        while self._leases and not self._ends(*self._leases[0]):
            self._leases.popleft()
        return self._leases[0][0] if self._leases else None

    def reader(self, rid: int) -> str:
        """The decode side of an attempt that is kept; "" of any other."""
        kept = self._kept.get(request_of(rid))
        return kept.peer if kept is not None and kept.rid == rid else ""

    def take(self, seq: Sequence, now: float, orphan: bool) -> list[WorkerOrder]:
        """Keep what a sequence has computed; call it before its blocks are released. `orphan`: its peer is gone."""
        size = self._pool.block_size
        orders = self.forget(request_of(seq.rid))
        full = min(seq.computed // size, len(seq.hashes), len(seq.blocks))
        tail = None
        if full * size < seq.computed <= len(seq.blocks) * size and full == seq.computed // size:
            tail = b"tail" + seq.rid.to_bytes(8, "big")
            self._pool.seal(seq.blocks[full], tail)
        kept = Kept(seq.rid, seq.peer, seq.hashes[:full], tail, seq.computed if tail else full * size)
        self._kept[request_of(seq.rid)] = kept
        self._pool.keep(self._names(kept))
        if orphan:
            self._start_lease(kept, now)
        return orders

    def wait(self, rid: int) -> None:
        """A later attempt has come for what is kept of its request: no lease ends before it had its turn."""
        kept = self._kept.get(request_of(rid))
        if kept is not None and kept.rid < rid:
            kept.until = inf

    def wait_no_more(self, rid: int, now: float) -> None:
        """That attempt is over, and did not take it."""
        kept = self._kept.get(request_of(rid))
        if kept is not None and kept.rid < rid and kept.until == inf:
            self._start_lease(kept, now)

    def tail(self, rid: int, num_known: int) -> tuple[int, int] | None:
        """The block behind that many known full ones, and the tokens whose KV is there with it."""
        kept = self._kept.get(request_of(rid))
        if kept is None or kept.tail is None or len(kept.hashes) != num_known:
            return None
        found = self._pool.match([kept.tail])
        return (found[0], kept.num_tokens) if found else None

    def release(self, rid: int) -> list[WorkerOrder]:
        """The decode side needs nothing of this attempt any more."""
        kept = self._kept.get(request_of(rid))
        return self.forget(request_of(rid)) if kept is not None and kept.rid == rid else []

    def forget(self, request: int) -> list[WorkerOrder]:
        """Keep nothing of a request: its full blocks are cached like any other."""
        kept = self._kept.pop(request, None)
        if kept is None:
            return []
        orders = self._stop_reading(kept)
        self._pool.unkeep(self._names(kept))
        self._drop_tail(kept)
        return orders

    def lose(self, peer: str, now: float) -> list[WorkerOrder]:
        """A decode side is gone: what it answered is kept for one lease, for the next attempt to find."""
        orders: list[WorkerOrder] = []
        for kept in self._kept.values():
            if kept.peer == peer and kept.until == inf:
                self._start_lease(kept, now)
                orders += self._stop_reading(kept)
        return orders

    def expire(self, now: float) -> list[WorkerOrder]:
        """Nobody came back for these."""
        orders: list[WorkerOrder] = []
        while self._leases and self._leases[0][0] <= now:
            until, request = self._leases.popleft()
            orders += self.forget(request) if self._ends(until, request) else []
        return orders

    # --- replication ---------------------------------------------------------------------------------------------

    def replicate(self, event: Replicate) -> list[WorkerOrder]:
        """More of an answer may be read."""
        kept = self._kept.get(request_of(event.rid))
        if kept is None or kept.rid != event.rid or kept.deaf:
            under_way = any(reading.rid == event.rid for reading in self._reads.values())
            return [] if under_way else [Drop(event.peer, event.rid)]  # it is said when that has settled
        reading = self._reads[kept.pull].hashes if kept.pull is not None else []
        if event.first != len(kept.hashes) + len(reading) + len(kept.waiting):
            kept.deaf = True
            return [] if reading else [Drop(event.peer, event.rid)]
        kept.waiting += zip(event.blocks, event.hashes, strict=True)
        return [] if reading else self._read_on(kept)

    def read(self, pull: int) -> list[WorkerOrder]:
        """A read is over and verified: its blocks are kept too."""
        reading = self._reads[pull]
        kept = reading.kept
        if kept is None:
            return self.settled(pull)
        del self._reads[pull]
        kept.pull = None
        self._pool.arrive(reading.target)
        self._drop_kept_tail(kept)
        for block, digest in zip(reading.target, reading.hashes, strict=True):
            self._pool.seal(block, digest)
        self._pool.keep(reading.hashes)
        self._pool.release(reversed(reading.target))
        kept.hashes += reading.hashes
        kept.num_tokens = len(kept.hashes) * self._pool.block_size
        return [Replicated(kept.peer, kept.rid, len(kept.hashes)), *self._read_on(kept)]

    def failed(self, pull: int) -> list[WorkerOrder]:
        """A read failed: no more of this request is taken."""
        kept = self._reads[pull].kept
        return self._stop_reading(kept) if kept is not None else []

    def settled(self, pull: int) -> list[WorkerOrder]:
        """Nothing of a read that was given up can land any more: its blocks are free, and the peer may go on."""
        orders = self.failed(pull)  # if it settles without a word before
        reading = self._reads.pop(pull)
        self._pool.settle(reading.target)
        return [*orders, Drop(reading.peer, reading.rid)]

    def _read_on(self, kept: Kept) -> list[WorkerOrder]:
        if kept.deaf or len(kept.waiting) > self._pool.num_spare:
            kept.deaf = True
            kept.waiting.clear()
            return [Drop(kept.peer, kept.rid)]
        if not kept.waiting:
            return []
        source, hashes = (list(part) for part in zip(*kept.waiting, strict=True))
        kept.waiting.clear()
        target = self._pool.take(len(source), reserved=True)
        kept.pull = next(self._pulls)
        self._reads[kept.pull] = Reading(kept, kept.peer, kept.rid, target, hashes)
        first = len(kept.hashes)
        return [Pull(kept.pull, kept.rid, kept.peer, first, tuple(source), tuple(target), Purpose.REPLICA)]

    def _stop_reading(self, kept: Kept) -> list[WorkerOrder]:
        """Whatever is being read is not wanted; nobody gets its blocks before that has settled."""
        kept.deaf = True
        kept.waiting.clear()
        pull, kept.pull = kept.pull, None
        if pull is None:
            return []
        self._reads[pull].kept = None
        self._pool.quarantine(self._reads[pull].target)
        return [CancelPull(pull)]

    def _start_lease(self, kept: Kept, now: float) -> None:
        kept.until = now + self._lease_s
        self._leases.append((kept.until, request_of(kept.rid)))

    def _ends(self, until: float, request: int) -> bool:
        """That lease is not of an earlier attempt."""
        kept = self._kept.get(request)
        return kept is not None and kept.until == until

    # --- names ---------------------------------------------------------------------------------------------------

    def _names(self, kept: Kept) -> list[bytes]:
        return kept.hashes if kept.tail is None else [*kept.hashes, kept.tail]

    def _drop_tail(self, kept: Kept) -> None:
        if kept.tail is not None:
            self._pool.unseal(kept.tail)
            kept.tail = None

    def _drop_kept_tail(self, kept: Kept) -> None:
        if kept.tail is not None:
            self._pool.unkeep([kept.tail])
        self._drop_tail(kept)
