"""The decode side of a handover: what is expected, reserved, read, verified and given up.

Blocks for a part are reserved when that part is ready at the source, so memory here is never promised to KV that does
not exist yet. Who gets memory first is the worker's decision (it calls `reserve`); blocks of a cancelled or failed read
are quarantined until the transport says that no byte can land any more. Knows the prefix this side already holds: that
does not travel.

Not responsible for running a sequence once it is here (`worker.py`).
"""

from collections import deque
from dataclasses import dataclass, replace
from itertools import count

from diptych.policy.blocks import BlockPool
from diptych.policy.ladder import TRANSFER, Ladder, Stage
from diptych.policy.messages import Beat, CancelPull, Done, Drop, Publish, Pull, WorkerOrder
from diptych.policy.sequence import Sequence

MAX_EARLY = 1 << 14  # parts that peers may speak of before their Place comes


@dataclass(slots=True)
class Reading:
    """One read under way. Not `live`: cancelled or failed, its target is in quarantine."""

    rid: int
    target: list[int]
    live: bool = True


class Incoming:
    """A sequence on its way here."""

    __slots__ = ("arrived", "asked", "broken", "claims", "final", "num_reads", "pledged", "published", "seq", "stage")

    def __init__(self, seq: Sequence, now: float):
        self.seq = seq
        self.stage = Ladder(TRANSFER, Stage.OFFERED, now)
        self.published: list[int] = []  # the source's block ids, in order
        self.final = False  # everything is published and the first token is here
        self.arrived = 0  # leading blocks of seq.blocks (shared or read) that hold their KV
        self.num_reads = 0  # reads not settled yet, live or not
        self.broken = False  # cannot be read: the KV will be computed here
        self.pledged = False  # the prefix cache was consulted
        self.claims = False  # stands in the worker's queue for memory
        self.asked = False  # Done was said; the answer decides

    @property
    def lacks(self) -> int:
        """Ready blocks that have no memory here yet."""
        return 0 if self.broken else max(len(self.published) - len(self.seq.blocks), 0)

    @property
    def complete(self) -> bool:
        """Every block is here and verified, and nothing reads at the source any more."""
        here = self.arrived == len(self.published) == len(self.seq.blocks)
        return self.final and not self.broken and here and self.num_reads == 0


class Sink:
    """All incoming sequences of one worker, and every read that may still write into its pool."""

    def __init__(self, pool: BlockPool, lease_s: float, pulls: "count[int]"):
        self._pool = pool
        self._pulls = pulls
        self._beat_s = lease_s / 3
        self._incoming: dict[int, Incoming] = {}
        self._reads: dict[int, Reading] = {}
        self._unread: dict[int, tuple[Drop, int]] = {}  # rid -> what to say when no read is left, and how many are
        self._next_beat: float | None = None
        self._lease_s = lease_s
        self._early: dict[int, list[Publish]] = {}  # a peer spoke of it before our own Place came
        self._early_until: deque[tuple[float, int]] = deque()

    def get(self, rid: int) -> Incoming | None:
        """The incoming sequence of that id, if it is one."""
        return self._incoming.get(rid)

    @property
    def num_expected(self) -> int:
        """Sequences on their way here, each of which a source holds for us."""
        return len(self._incoming)

    def is_empty(self) -> bool:
        """Nothing is expected, and no read can touch memory here or at a source."""
        return not (self._incoming or self._reads or self._unread)

    def stuck(self) -> bool:
        """No read is under way and no answer awaited: nothing here will free or fill memory by itself."""
        return not self._reads and not any(coming.asked for coming in self._incoming.values())

    def next_deadline(self) -> float | None:
        """When the sources must hear from us."""
        early = self._early_until[0][0] if self._early_until else None
        return min((t for t in (self._next_beat, early) if t is not None), default=None)

    def expect(self, seq: Sequence, now: float) -> list[Publish]:
        """A sequence was placed here; its KV will be offered by its peer. Returns what the peer said of it already."""
        self._incoming[seq.rid] = Incoming(seq, now)
        if self._next_beat is None:
            self._next_beat = now + self._beat_s
        return [event for event in self._early.pop(seq.rid, []) if event.peer == seq.peer]  # others have no say in it

    def keep(self, event: Publish, now: float) -> list[WorkerOrder]:
        """A peer may speak of a request before our own Place arrives; what nobody claims is declined in time."""
        self._early.setdefault(event.rid, []).append(event)
        self._early_until.append((now + self._lease_s, event.rid))
        return self._decline_oldest() if len(self._early_until) > MAX_EARLY else []

    def ignore(self, rid: int, peer: str = "") -> None:
        """What was said of it too early, by one peer or by anybody, is of no interest any more."""
        left = [event for event in self._early.pop(rid, []) if peer and event.peer != peer]
        if left:
            self._early[rid] = left

    def decline(self, now: float) -> list[WorkerOrder]:
        """Tell the sources of what nobody claimed for a lease that nobody reads it."""
        orders: list[WorkerOrder] = []
        while self._early_until and self._early_until[0][0] <= now:
            orders += self._decline_oldest()
        return orders

    def _decline_oldest(self) -> list[WorkerOrder]:
        rid = self._early_until.popleft()[1]
        peers = dict.fromkeys(event.peer for event in self._early.pop(rid, []))
        return [Drop(peer, rid) for peer in peers]

    def published(self, event: Publish) -> Incoming | None:
        """More of a sequence is ready."""
        coming = self._incoming.get(event.rid)
        if coming is not None and not coming.final:
            coming.published += event.blocks
            coming.final = event.final
            known = coming.seq.num_tokens
            whole = event.num_tokens == known if event.final else event.num_tokens <= known
            if not whole or len(coming.published) != self._pool.blocks_for(event.num_tokens):
                coming.broken = True  # an earlier part came before our Place and was forgotten; or it is nonsense
        return coming

    def pledge(self, coming: Incoming) -> None:
        """Share the prefix this worker already holds; it will not travel."""
        if not coming.pledged:
            coming.pledged = True
            known = self._pool.match(coming.seq.hashes[: coming.seq.num_tokens // self._pool.block_size])
            self._pool.share(known)
            coming.seq.blocks = known
            coming.seq.sealed = coming.arrived = len(known)

    def reserve(self, coming: Incoming, now: float) -> Pull:
        """Reserve memory for what is ready and order the read. The caller made sure that enough is available."""
        seq, first = coming.seq, len(coming.seq.blocks)
        target = self._pool.take(coming.lacks, reserved=True)
        seq.blocks += target
        coming.num_reads += 1
        coming.stage.climb(Stage.READING, now)
        pull = next(self._pulls)
        self._reads[pull] = Reading(seq.rid, target)
        return Pull(pull, seq.rid, seq.peer, first, tuple(coming.published[first:]), tuple(target))

    def read(self, pull: int, now: float) -> Incoming | None:
        """A read is over and verified. Returns its sequence; None where it came too late (then call `settled`)."""
        reading = self._reads.get(pull)
        if reading is None or not reading.live:
            return None
        del self._reads[pull]
        self._pool.arrive(reading.target)
        coming = self._incoming[reading.rid]
        coming.num_reads -= 1
        coming.arrived += len(reading.target)
        if coming.num_reads == 0:
            coming.stage.climb(Stage.VERIFIED if coming.complete else Stage.OFFERED, now)
        return coming

    def failed(self, pull: int, now: float) -> tuple[Incoming | None, list[WorkerOrder]]:
        """A live read failed: its sequence is to be computed here once it is all known."""
        reading = self._reads.get(pull)
        if reading is None or not reading.live:
            return None, []
        coming = self._incoming[reading.rid]
        return coming, self.give_up(coming, now)

    def settled(self, pull: int, now: float) -> list[WorkerOrder]:
        """Nothing of a cancelled or failed read can land any more: its blocks are free."""
        reading = self._reads.pop(pull, None)
        if reading is None:
            return []
        self._pool.settle(reading.target)
        coming = self._incoming.get(reading.rid)
        if coming is None:
            return self._count_down(reading.rid)
        coming.num_reads -= 1
        if coming.num_reads == 0 and not coming.broken:
            coming.stage.climb(Stage.OFFERED, now)
        return self.ask(coming)

    def give_up(self, coming: Incoming, now: float) -> list[WorkerOrder]:
        """It cannot be read: free what arrived, quarantine what may still be written; it stays expected."""
        coming.broken = True
        return self._let_go(coming, now, Stage.FAILED)

    def evict(self, coming: Incoming, now: float) -> list[WorkerOrder]:
        """Take its memory for an older request; the source still holds its KV, so it only reads again later."""
        return self._let_go(coming, now, Stage.OFFERED)

    def forget(self, coming: Incoming, now: float, drop: bool, kept: bool = False) -> list[WorkerOrder]:
        """It is read no more. With `drop` the source is told so (and `kept`), when nothing reads from it any more."""
        orders = [] if coming.broken else self._let_go(coming, now, Stage.FAILED)
        del self._incoming[coming.seq.rid]
        if not drop:
            return orders
        left = sum(reading.rid == coming.seq.rid for reading in self._reads.values())
        if left:
            self._unread[coming.seq.rid] = (Drop(coming.seq.peer, coming.seq.rid, kept), left)
            return orders
        return [*orders, Drop(coming.seq.peer, coming.seq.rid, kept)]

    def accept(self, rid: int, now: float) -> Sequence:
        """It is all here and ours."""
        coming = self._incoming.pop(rid)
        coming.stage.climb(Stage.SETTLED, now)
        return coming.seq

    def ask(self, coming: Incoming) -> list[WorkerOrder]:
        """Tell the source that everything is here, if it is; once."""
        if coming.asked or not coming.complete:
            return []
        coming.asked = True
        return [Done(coming.seq.peer, coming.seq.rid)]

    def release(self, rid: int) -> bool:
        """What is kept of it is not wanted any more: if its Drop is still to be said, that will say so."""
        drop, left = self._unread.get(rid, (None, 0))
        if drop is not None:
            self._unread[rid] = (replace(drop, kept=False), left)
        return drop is not None

    def settling(self, rid: int) -> bool:
        """It is wanted no more, but reads of it may still touch memory; the source hears Drop after the last."""
        return rid in self._unread

    def of_peer(self, peer: str) -> list[Incoming]:
        """Everything expected from one peer."""
        return [coming for coming in self._incoming.values() if coming.seq.peer == peer]

    def youngest(self, older_than: tuple[int, int]) -> Incoming | None:
        """The youngest incoming sequence that holds memory here and is younger than that."""
        holders = [c for c in self._incoming.values() if c.seq.blocks and not c.complete and c.seq.key > older_than]
        return max(holders, key=lambda coming: coming.seq.key, default=None)

    def beat(self, now: float) -> list[Beat]:
        """Extend our leases, where it is time to."""
        if self._next_beat is None or now < self._next_beat:
            return []
        wanted: dict[str, list[int]] = {}
        for rid, coming in self._incoming.items():
            wanted.setdefault(coming.seq.peer, []).append(rid)
        for rid, (drop, _) in self._unread.items():
            wanted.setdefault(drop.peer, []).append(rid)
        self._next_beat = now + self._beat_s if wanted else None
        return [Beat(peer, tuple(rids)) for peer, rids in wanted.items()]

    def _let_go(self, coming: Incoming, now: float, stage: Stage) -> list[WorkerOrder]:
        orders: list[WorkerOrder] = []
        reserved: set[int] = set()
        for pull, reading in self._reads.items():
            if reading.live and reading.rid == coming.seq.rid:
                reading.live = False
                self._pool.quarantine(reading.target)
                reserved.update(reading.target)
                orders.append(CancelPull(pull))
        self._pool.release(block for block in coming.seq.blocks if block not in reserved)
        coming.seq.restart()
        coming.arrived = 0
        coming.pledged = False
        if reserved:
            coming.stage.climb(Stage.QUARANTINED, now)
        else:
            coming.stage.climb(stage, now)
        return orders

    def _count_down(self, rid: int) -> list[WorkerOrder]:
        if rid not in self._unread:
            return []
        drop, left = self._unread.pop(rid)
        if left > 1:
            self._unread[rid] = (drop, left - 1)
            return []
        return [drop]
