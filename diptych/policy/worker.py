"""A worker's every decision: `on(now, event) -> orders`.

One class for prefill, decode and mixed workers; the part a request is to have here comes with its `Place`. The life of
a sequence on this worker:

    Place --> claims --(memory)--> running --(steps)--> finished              part mixed
    Place --> claims --(memory)--> running --> offered --(Done)--> finished   part prefill (`source.py`)
    Place --> incoming --(reads)--> running --> finished                      part decode (`sink.py`)

Everyone who needs memory stands in one queue, `claims`, oldest first, and nobody overtakes: a prompt
that wants to start, a sequence that lost its memory, and ready parts of incoming KV alike. Only KV that exists at a
source is given memory here, and a source never waits for a sink, so no circle of waiting can close.

Not responsible for computing, moving bytes, waiting or reading a clock.
"""

from bisect import insort

from diptych.policy.batching import WorkerSpec, compose, crossings, repeats
from diptych.policy.blocks import BlockPool
from diptych.policy.ladder import Rung
from diptych.policy.messages import (
    Answer,
    Beat,
    Cancel,
    Done,
    Drop,
    Emit,
    Finish,
    Offer,
    PeerLost,
    Place,
    Publish,
    Read,
    ReadFailed,
    Reason,
    Revoke,
    Role,
    Run,
    Settled,
    Slice,
    StepDone,
    Tick,
    WorkerEvent,
    WorkerOrder,
)
from diptych.policy.pace import StepTimes
from diptych.policy.sequence import Sequence
from diptych.policy.sink import Incoming, Sink
from diptych.policy.source import Source


def _age(seq: Sequence) -> tuple[int, int]:
    return seq.key


class Worker:
    """The policy of one worker. Feed it events in order; do what it orders, in order."""

    def __init__(self, spec: WorkerSpec):
        self.spec = spec
        self.pool = BlockPool(spec.num_blocks, spec.block_size)
        self.times = StepTimes()
        self.source = Source(self.pool, spec.lease_s)
        self.sink = Sink(self.pool, spec.lease_s)
        self.seqs: dict[int, Sequence] = {}  # everything placed here that has not ended, or is still in a step
        self.claims: list[Sequence] = []  # those that need memory before they can go on, oldest first
        self.running: list[Sequence] = []  # those with memory for every token known so far, oldest first
        self.num_preempted = 0
        self._num_freed = 0  # how often a sequence had its memory taken back
        self._starved: Sequence | None = None  # the oldest that could not decode for want of a block
        self._steps: dict[int, tuple[Slice, ...]] = {}
        self._next_step = 0
        self._early: dict[int, list[Publish]] = {}  # heard from a peer before our own Place came
        self._early_until: list[tuple[float, int]] = []
        self._orders: list[WorkerOrder] = []

    def on(self, now: float, event: WorkerEvent) -> list[WorkerOrder]:
        """Take in one event; returns what is to be done about it, in order."""
        match event:
            case StepDone():
                self._step_done(now, event)
            case Place():
                self._place(now, event)
            case Cancel(rid=rid):
                self._cancel(now, rid)
            case Publish():
                self._published(now, event)
            case Read():
                self._read(now, event.pull)
            case ReadFailed(pull=pull):
                self._read_failed(now, pull)
            case Settled(pull=pull):
                self._settled(now, pull)
            case Done():
                self._done(now, event)
            case Answer():
                self._answered(now, event)
            case Drop(rid=rid):
                self._dropped(now, rid)
            case Revoke():
                self._revoked(now, event)
            case Beat():
                self._beaten(now, event)
            case PeerLost(peer=peer):
                self._peer_lost(now, peer)
            case Offer():
                pass  # memory is given to KV that exists, so a promise alone changes nothing here
            case Tick():
                self._tick(now)
        while self._proceed(now):
            pass
        orders, self._orders = self._orders, []
        return orders

    def _proceed(self, now: float) -> bool:
        """Hand out memory and plan steps; True if planning took memory back, or met a want that held others up."""
        starved, num_freed = self._starved, self._num_freed
        self._grant(now)
        self._compose(now)
        return num_freed != self._num_freed or (starved is not None and self._starved is None)

    def next_deadline(self) -> float | None:
        """When a Tick is wanted next, if at all."""
        early = self._early_until[0][0] if self._early_until else None
        times = [t for t in (self.source.next_deadline(), self.sink.next_deadline(), early) if t is not None]
        return min(times, default=None)

    def horizon(self) -> int:
        """How often the step just ordered may be repeated before any decision could change."""
        if len(self._steps) != 1 or self.spec.depth > 1 or self.spec.itl_budget_s is not None:
            return 1
        (slices,) = self._steps.values()
        return repeats(slices, self.seqs, self.running, self.pool)

    def idle_reason(self) -> str:
        """Why no step is being computed: "" while one is, "no work", or what is waited for."""
        if self._steps:
            return ""
        if self.claims:
            return "memory"
        return "a peer" if self.seqs else "no work"

    # --- coming in -----------------------------------------------------------------------------------------------

    def _place(self, now: float, place: Place) -> None:
        seq = Sequence(place, now)
        self.seqs[seq.rid] = seq
        if self.pool.blocks_for(seq.target - 1) > self.pool.num_blocks:  # the last token's KV is never written
            self._end(now, seq, Reason.REFUSED)
        elif place.part == Role.DECODE:
            self.sink.expect(seq, now)
            for event in self._early.pop(seq.rid, []):
                self._published(now, event)
        else:
            insort(self.claims, seq, key=_age)

    def _grant(self, now: float) -> None:
        """Give memory to those who need it, oldest first, until one cannot have what it needs."""
        starved = self._starved
        while self.claims:
            seq = self.claims[0]
            if starved is not None and starved.ended is None and starved.key < seq.key:
                return  # what becomes free is for whoever had it taken back for its sake
            coming = self.sink.get(seq.rid)
            if not (self._reserve(now, coming) if coming else self._admit(now, seq)):
                if self.running or self._steps or not self.sink.stuck() or not self._evict_youngest(now, seq):
                    return
                continue
            self.claims.remove(seq)

    def _admit(self, now: float, seq: Sequence) -> bool:
        """Memory for every token known so far, less the prefix this worker already holds."""
        pool = self.pool
        if not self._may_grow(seq) or (self.running and pool.num_available <= seq.tight):
            return False
        known = pool.match(seq.hashes[: (seq.num_tokens - 1) // pool.block_size])
        need = pool.blocks_for(seq.num_tokens) - len(known)
        idle = sum(map(pool.is_idle, known))
        growth = 0 if seq.part == Role.PREFILL else min(len(self.running), pool.num_blocks // 50)
        if need + idle + growth > pool.num_available:
            seq.tight = pool.num_available
            return False
        pool.share(known)
        seq.blocks = known + pool.take(need)
        seq.sealed = len(known)
        seq.num_computed = seq.computed = len(known) * pool.block_size
        seq.life.climb(Rung.PREFILLING, now)
        insort(self.running, seq, key=_age)
        if seq.part == Role.PREFILL:
            self._orders.append(self.source.open(seq))
        return True

    def _reserve(self, now: float, coming: Incoming) -> bool:
        """Memory for what is ready of an incoming sequence, and the order to read it."""
        if not self._may_grow(coming.seq):
            return False
        self.sink.pledge(coming)
        if coming.lacks > self.pool.num_available:
            return False
        if coming.lacks:
            self._orders.append(self.sink.reserve(coming, now))
        coming.claims = False
        self._orders += self.sink.ask(coming)
        return True

    def _may_grow(self, seq: Sequence) -> bool:
        """The batch may take one more: it is not full, and its steps stay inside the inter-token budget."""
        if len(self.running) >= self.spec.max_batch:
            return False
        budget = self.spec.itl_budget_s
        if budget is None or seq.part == Role.PREFILL:
            return True
        decodes = [other for other in self.running if other.decodes or other.inflight]
        context = sum(other.num_tokens for other in decodes) + seq.num_tokens
        return not decodes or self.times.predict(len(decodes) + 1, context) <= budget

    # --- stepping ------------------------------------------------------------------------------------------------

    def _compose(self, now: float) -> None:
        while len(self._steps) < self.spec.depth:
            self._starved = None
            slices = compose(self.running, self.pool, self.spec, self.times, lambda seq: self._make_room(now, seq))
            if not slices and self._yield_memory(now):
                continue
            if not slices:
                return
            self._next_step += 1
            self._steps[self._next_step] = tuple(slices)
            self._orders.append(Run(self._next_step, tuple(slices)))

    def _step_done(self, now: float, event: StepDone) -> None:
        slices = self._steps.pop(event.step)
        if self.spec.itl_budget_s is not None:
            self.times.observe(sum(s.count for s in slices), sum(s.start + s.count for s in slices), event.elapsed_s)
        if event.count > 1:
            self._fast_forward(slices, event.count)
        for rid, digest in event.filled:
            self.seqs[rid].hashes.append(digest)
        for piece in slices:
            seq = self.seqs[piece.rid]
            seq.inflight -= 1
            if seq.ended is not None:
                if seq.inflight == 0:
                    self._let_go(now, seq)
                continue
            seq.computed = piece.start + piece.count + event.count - 1
            self._seal(seq)
            if piece.sample:
                self._sampled(now, seq, event.count, piece.rid in event.finished)
            elif seq.part == Role.PREFILL:
                self._publish(now, seq, final=False)

    def _fast_forward(self, slices: tuple[Slice, ...], count: int) -> None:
        """Plan what `count - 1` further single steps would have planned, block for block."""
        members = [self.seqs[piece.rid] for piece in slices]
        size = self.pool.block_size
        grown = sorted((k, i) for i, seq in enumerate(members) for k in crossings(seq, count, size))
        for _, i in grown:
            members[i].blocks += self.pool.take(1)
        for seq in members:
            seq.num_computed += count - 1
            seq.num_tokens += count - 1

    def _sampled(self, now: float, seq: Sequence, count: int, stopped: bool) -> None:
        """It wrote `count` tokens of its answer."""
        self._orders.append(Emit(seq.rid, seq.emitted, count))
        seq.emitted += count
        if stopped or seq.emitted >= seq.max_new:
            self._end(now, seq, Reason.STOP if stopped else Reason.LENGTH)
        elif seq.part == Role.PREFILL:
            self.running.remove(seq)
            seq.life.climb(Rung.HANDOVER, now)
            self._publish(now, seq, final=True)
        else:
            seq.life.climb(Rung.DECODING, now)

    def _publish(self, now: float, seq: Sequence, final: bool) -> None:
        order = self.source.publish(seq, now, final)
        if order is not None:
            self._orders.append(order)

    def _seal(self, seq: Sequence) -> None:
        """Make known the blocks that are full now, for others with the same prefix."""
        full = min(seq.computed // self.pool.block_size, len(seq.hashes))
        for i in range(seq.sealed, full):
            self.pool.seal(seq.blocks[i], seq.hashes[i])
        seq.sealed = max(seq.sealed, full)

    # --- taking memory back --------------------------------------------------------------------------------------

    def _make_room(self, now: float, seq: Sequence) -> bool:
        """Free a block for a decode that has none left, at the cost of whoever is youngest; False if it must wait."""
        if self.pool.num_quarantined:  # taken back already, and free as soon as no read can touch it
            self._starved = self._starved or seq
            return False
        others = [o for o in self.running if o.key > seq.key and not o.inflight and o.part != Role.PREFILL and o.blocks]
        victim = max(others, key=_age, default=None)
        coming = self.sink.youngest(seq.key)
        if coming is not None and (victim is None or coming.seq.key > victim.key):
            self._evict(now, coming)
        elif victim is not None:
            self._preempt(now, victim)
        if self.pool.num_available == 0:
            self._starved = self._starved or seq
        return self.pool.num_available > 0

    def _yield_memory(self, now: float) -> bool:
        """Nobody who runs can go on, older KV on its way here holds what they lack: the youngest gives its own back."""
        if self._steps or not self.running or not self.sink.stuck():
            return False
        self._preempt(now, self.running[-1])
        self._grant(now)
        return bool(self.running)

    def _preempt(self, now: float, seq: Sequence) -> None:
        """Free all its blocks; it will compute its KV again when it is its turn."""
        self.num_preempted += 1
        self._num_freed += 1
        self.running.remove(seq)
        self.pool.release(reversed(seq.blocks))
        seq.restart()
        seq.life.climb(Rung.QUEUED, now)
        insort(self.claims, seq, key=_age)

    def _evict(self, now: float, coming: Incoming) -> None:
        """Take back the memory of a sequence that is still on its way; it is read again when it is its turn."""
        self._num_freed += 1
        self._orders += self.sink.evict(coming, now)
        self._claim(coming)

    def _evict_youngest(self, now: float, seq: Sequence) -> bool:
        coming = self.sink.youngest(seq.key)
        if coming is not None:
            self._evict(now, coming)
        return coming is not None

    def _claim(self, coming: Incoming) -> None:
        if not coming.claims:
            coming.claims = True
            insort(self.claims, coming.seq, key=_age)

    def _unclaim(self, coming: Incoming) -> None:
        if coming.claims:
            coming.claims = False
            self.claims.remove(coming.seq)

    # --- handover: decode side -----------------------------------------------------------------------------------

    def _keep_early(self, now: float, event: Publish) -> None:
        """A peer may speak of a request before our own Place arrives; what nobody claims is declined in time."""
        if event.rid not in self.seqs:
            self._early.setdefault(event.rid, []).append(event)
            self._early_until.append((now + self.spec.lease_s, event.rid))

    def _published(self, now: float, event: Publish) -> None:
        coming = self.sink.published(event)
        if coming is None:
            self._keep_early(now, event)
        elif coming.broken:
            self._orders += self.sink.give_up(coming, now)
            self._broken(now, coming)
        elif coming.lacks or not coming.pledged:
            self._claim(coming)
        else:
            self._orders += self.sink.ask(coming)

    def _read(self, now: float, pull: int) -> None:
        coming = self.sink.read(pull, now)
        self._orders += self.sink.ask(coming) if coming else self.sink.settled(pull, now)

    def _read_failed(self, now: float, pull: int) -> None:
        coming, orders = self.sink.failed(pull, now)
        self._orders += orders
        if coming is not None:
            self._broken(now, coming)

    def _settled(self, now: float, pull: int) -> None:
        self._read_failed(now, pull)  # if it settles without a word before
        self._orders += self.sink.settled(pull, now)

    def _broken(self, now: float, coming: Incoming) -> None:
        """It cannot be read: no memory for it until it is all known, then it is computed here."""
        self._unclaim(coming)
        if coming.final:
            self._recompute(now, coming, drop=True)

    def _answered(self, now: float, event: Answer) -> None:
        coming = self.sink.get(event.rid)
        if coming is None:
            return
        if event.ok:
            self._accept(now, coming)
        elif coming.final:
            self._orders += self.sink.give_up(coming, now)
            self._recompute(now, coming, drop=False)
        else:
            self._end(now, coming.seq, Reason.PEER_LOST)  # the source does not know it: its process is a new one

    def _accept(self, now: float, coming: Incoming) -> None:
        seq = self.sink.accept(coming.seq.rid, now)
        seq.arrived()
        self._seal(seq)
        seq.life.climb(Rung.DECODING, now)
        insort(self.running, seq, key=_age)

    def _recompute(self, now: float, coming: Incoming, drop: bool) -> None:
        """Its KV could not be read: compute it here, from the tokens, which the driver has."""
        seq = coming.seq
        self._unclaim(coming)
        self._orders += self.sink.forget(coming, now, drop)
        seq.arrived()
        seq.restart()
        seq.life.climb(Rung.QUEUED, now)
        insort(self.claims, seq, key=_age)

    def _revoked(self, now: float, event: Revoke) -> None:
        self._early.pop(event.rid, None)
        coming = self.sink.get(event.rid)
        if coming is None:
            if not self.sink.settling(event.rid):
                self._orders.append(Drop(event.peer, event.rid))
        else:
            self._end(now, coming.seq, Reason.CANCELLED)

    # --- handover: prefill side ----------------------------------------------------------------------------------

    def _done(self, now: float, event: Done) -> None:
        answer, seq = self.source.done(event)
        self._orders.append(answer)
        if seq is not None:
            self._end(now, seq, Reason.HANDED_OVER)

    def _beaten(self, now: float, event: Beat) -> None:
        """A peer waits for these; of what is not here (any more) it hears so, and need not wait for ever."""
        for rid in event.rids:
            self.source.beat(rid, now)
            if rid not in self.source and rid not in self.seqs:
                self._orders.append(Answer(event.peer, rid, False))

    def _dropped(self, now: float, rid: int) -> None:
        seq = self.source.drop(rid)
        if seq is not None:
            self._unfence(now, seq, Reason.CANCELLED if seq.wants else Reason.HANDED_OVER)

    def _unfence(self, now: float, seq: Sequence, reason: Reason) -> None:
        """Nobody reads its blocks any more."""
        if seq.rid in self.seqs:
            self._end(now, seq, reason)
        else:
            self.pool.release(reversed(seq.blocks))

    def _peer_lost(self, now: float, peer: str) -> None:
        for seq in self.source.lose(peer):
            self._unfence(now, seq, Reason.PEER_LOST)
        for seq in [seq for seq in self.claims if seq.part == Role.PREFILL and seq.peer == peer]:
            self._end(now, seq, Reason.PEER_LOST)
        for coming in self.sink.of_peer(peer):
            if coming.asked:  # verified by checksum: it needs no answer from the dead
                self._accept(now, coming)
            elif coming.final:
                self._orders += [] if coming.broken else self.sink.give_up(coming, now)
                self._recompute(now, coming, drop=False)
            else:
                self._end(now, coming.seq, Reason.PEER_LOST)

    # --- going out -----------------------------------------------------------------------------------------------

    def _tick(self, now: float) -> None:
        for seq in self.source.expire(now):
            self._unfence(now, seq, Reason.EXPIRED)
        self._orders += self.sink.beat(now)
        while self._early_until and self._early_until[0][0] <= now:
            rid = self._early_until.pop(0)[1]
            unclaimed = self._early.pop(rid, [])
            if unclaimed:
                self._orders.append(Drop(unclaimed[0].peer, rid))

    def _cancel(self, now: float, rid: int) -> None:
        self._early.pop(rid, None)
        seq = self.seqs.get(rid)
        if seq is not None and seq.ended is None:
            self._end(now, seq, Reason.CANCELLED)

    def _end(self, now: float, seq: Sequence, reason: Reason) -> None:
        """It goes no further here, and says so at once, with its last token: nobody must write on after a stop token.

        While a step in flight carries it, it keeps its blocks; the end of that step ends it again.
        """
        if seq.ended is None:
            seq.ended = reason
            seq.life.climb(_LAST.get(reason, Rung.FAILED), now)
            self._orders.append(Finish(seq.rid, self.spec.name, reason, seq.life.durations()))
        if seq.inflight == 0:
            self._let_go(now, seq)

    def _let_go(self, now: float, seq: Sequence) -> None:
        """Give back what an ended sequence holds, but for what a peer may still read."""
        for queue in (self.running, self.claims):
            if seq in queue:
                queue.remove(seq)
        coming = self.sink.get(seq.rid)
        if coming is not None:
            self._orders += self.sink.forget(coming, now, drop=seq.ended != Reason.PEER_LOST)
        elif seq.rid in self.source:
            revoke = self.source.revoke(seq, now)
            if revoke is not None:
                self._orders.append(revoke)
            else:
                self.pool.release(reversed(seq.blocks))
        else:
            self.pool.release(reversed(seq.blocks))
        del self.seqs[seq.rid]


_LAST = {
    Reason.STOP: Rung.FINISHED,
    Reason.LENGTH: Rung.FINISHED,
    Reason.HANDED_OVER: Rung.FINISHED,
    Reason.CANCELLED: Rung.CANCELLED,
}
"""The rung on which a sequence ends here, by reason; anything else failed."""
