"""The prefill side of a handover: what is offered, published, leased and taken back.

An offer holds a sequence's blocks until the decode side is done with them (`Done`), does not read them (`Drop`), is
lost (`PeerLost`), or stays silent beyond the lease. The lease runs from the moment this side has nothing more to do
for the sequence; `Beat` extends it. Not responsible for computing the blocks (`worker.py`).
"""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import inf

from diptych.policy.blocks import BlockPool
from diptych.policy.messages import Answer, Done, Offer, Publish, Revoke, WorkerOrder
from diptych.policy.sequence import Sequence


@dataclass(slots=True)
class OpenOffer:
    """The blocks a peer may read, and until when at least."""

    seq: Sequence
    blocks: set[int] = field(default_factory=set)  # those published: the leading ones of the sequence
    lease: float = inf


class Source:
    """All open offers of one worker."""

    def __init__(self, pool: BlockPool, lease_s: float):
        self._pool = pool
        self._lease_s = lease_s
        self._offers: dict[int, OpenOffer] = {}
        self._leases: list[tuple[float, int]] = []  # heap; entries may be stale (leases only grow)

    def __contains__(self, rid: int) -> bool:
        return rid in self._offers

    @property
    def num_open(self) -> int:
        """Offers that are not closed yet."""
        return len(self._offers)

    def is_empty(self) -> bool:
        """Nobody may read anything here."""
        return not self._offers

    def next_deadline(self) -> float | None:
        """When the next lease may end."""
        return self._leases[0][0] if self._leases else None

    def reader(self, rid: int) -> str:
        """The peer that may read it; "" where none may."""
        offer = self._offers.get(rid)
        return offer.seq.peer if offer is not None else ""

    def covers(self, rid: int, blocks: Iterable[int]) -> bool:
        """A peer may read these now, by the offer of that attempt. O(blocks).

        The one method, with that of `copies.py`, that another thread may call while this one works: it finds an offer
        by one look into the dict, and then asks a set that only grows, block by block. What is closed meanwhile was
        open when the question came.
        """
        offer = self._offers.get(rid)
        return offer is not None and offer.blocks.issuperset(blocks)

    def open(self, seq: Sequence) -> Offer:
        """Promise the sequence's KV to its peer."""
        self._offers[seq.rid] = OpenOffer(seq)
        return Offer(seq.peer, seq.rid, seq.num_tokens)

    def publish(self, seq: Sequence, now: float, final: bool) -> list[WorkerOrder]:
        """Let the peer read what became ready: full blocks, with `final` also the last one and the lease starts."""
        offer = self._offers[seq.rid]
        ready = self._pool.blocks_for(seq.computed) if final else seq.computed // self._pool.block_size
        fresh = seq.blocks[len(offer.blocks) : ready]
        if not fresh and not final:
            return []
        self._pool.offer(fresh)
        offer.blocks.update(fresh)
        if final:
            self._start_lease(offer, now)
        num_tokens = seq.computed if final else ready * self._pool.block_size
        return [Publish(seq.peer, seq.rid, tuple(fresh), num_tokens, final)]

    def revoke(self, seq: Sequence, now: float) -> Revoke | None:
        """Ask the peer to stop reading; the blocks stay offered until it says so or the lease ends."""
        offer = self._offers[seq.rid]
        if not offer.blocks:
            self._close(offer)
            return None
        self._start_lease(offer, now)
        return Revoke(seq.peer, seq.rid)

    def done(self, event: Done) -> tuple[WorkerOrder, Sequence | None]:
        """The peer has everything: the answer to give, and the sequence that is free now (None: too late)."""
        offer = self._offers.get(event.rid)
        if offer is None or offer.seq.ended is not None:
            return Answer(event.peer, event.rid, False), None
        self._close(offer)
        return Answer(event.peer, event.rid, True), offer.seq

    def drop(self, rid: int) -> Sequence | None:
        """The peer does not read (any more): the sequence that is free now, if it was offered."""
        offer = self._offers.get(rid)
        if offer is None:
            return None
        self._close(offer)
        return offer.seq

    def beat(self, rid: int, now: float) -> None:
        """The peer still wants this."""
        offer = self._offers.get(rid)
        if offer is not None and offer.lease != inf:
            offer.lease = now + self._lease_s

    def lose(self, peer: str) -> list[Sequence]:
        """A peer is gone, and with it every reader: the sequences that are free now."""
        lost = [offer for offer in self._offers.values() if offer.seq.peer == peer]
        for offer in lost:
            self._close(offer)
        return [offer.seq for offer in lost]

    def expire(self, now: float) -> list[Sequence]:
        """End the leases that are over: the sequences that are free now."""
        freed = []
        while self._leases and self._leases[0][0] <= now:
            _, rid = heapq.heappop(self._leases)
            offer = self._offers.get(rid)
            if offer is None:
                continue
            if offer.lease > now:
                heapq.heappush(self._leases, (offer.lease, rid))
                continue
            self._close(offer)
            freed.append(offer.seq)
        return freed

    def _start_lease(self, offer: OpenOffer, now: float) -> None:
        offer.lease = now + self._lease_s
        heapq.heappush(self._leases, (offer.lease, offer.seq.rid))

    def _close(self, offer: OpenOffer) -> None:
        del self._offers[offer.seq.rid]
        self._pool.withdraw(offer.blocks)
