"""A worker's every decision: `on(now, event) -> orders`.

One class for prefill, decode and mixed workers; the part a request is to have here comes with its `Place`. The life of
a sequence on this worker:

    Place --> claims --(memory)--> running --(steps)--> finished              part mixed (`memory.py`, `batching.py`)
    Place --> claims --(memory)--> running --> offered --(Done)--> finished   part prefill (`source.py`)
    Place --> claims --(memory)--> running --> finished                       part prefill, writing nothing
    Place --> incoming --(reads)--> running --> finished                      part decode (`receiver.py`)

Not responsible for computing, moving bytes, waiting or reading a clock.
"""

from itertools import count

from diptych.policy.batching import WorkerSpec, compose, fast_forward, repeats
from diptych.policy.blocks import BlockPool
from diptych.policy.copies import Copies
from diptych.policy.handover import Meter
from diptych.policy.keep import Keep
from diptych.policy.ladder import Rung
from diptych.policy.membership import Drain, Drained
from diptych.policy.memory import Memory
from diptych.policy.messages import (
    MAX_ATTEMPTS,
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
from diptych.policy.receiver import Receiver
from diptych.policy.retention import Release, Replicate, Replicated
from diptych.policy.sequence import Sequence
from diptych.policy.sink import Sink
from diptych.policy.source import Source


class Worker:
    """The policy of one worker. Feed it events in order; do what it orders, in order."""

    def __init__(self, spec: WorkerSpec):
        self.spec = spec
        self.pool = BlockPool(spec.num_blocks, spec.block_size)
        self.times = StepTimes()
        pulls = count(1)
        self.source = Source(self.pool, spec.lease_s)
        self.sink = Sink(self.pool, spec.lease_s, pulls)
        self.keep = Keep(self.pool, spec.lease_s, pulls)
        self.copies = Copies(self.pool, spec.lease_s)
        self.seqs: dict[int, Sequence] = {}  # everything placed here that has not ended, or is still in a step
        self._steps: dict[int, tuple[Slice, ...]] = {}
        self._next_step = 0
        self._leaving = False  # asked to say when nothing is left here; nothing more is placed
        self._orders: list[WorkerOrder] = []
        self.memory = Memory(spec, self.pool, self.source, self.sink, self.keep, self.times, self._steps, self._orders)
        self.receiver = Receiver(
            self.sink, self.keep, self.memory, self.seqs, self._orders, self._end, spec.replicate, Meter(spec.name)
        )
        self._successors: dict[int, Sequence] = {}  # waits until that earlier attempt has let go of its blocks
        self.claims, self.running = self.memory.claims, self.memory.running

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
                self.receiver.published(now, event)
            case Read():
                self.receiver.read(now, event)
            case ReadFailed(pull=pull):
                self.receiver.read_failed(now, pull)
            case Settled(pull=pull):
                self.receiver.settled(now, pull)
            case Done():
                self._done(now, event)
            case Answer():
                self.receiver.answered(now, event)
            case Drop():
                self._dropped(now, event)
            case Replicate():
                self._orders += self.keep.replicate(event)
            case Replicated():
                self.copies.copied(event.rid, event.num_blocks)
            case Release(rid=rid):
                self._orders += self.keep.release(rid)
            case Revoke():
                self.receiver.revoked(now, event)
            case Beat():
                self._beaten(now, event)
            case PeerLost(peer=peer):
                self._peer_lost(now, peer)
            case Offer():
                pass  # memory is given to KV that exists, so a promise alone changes nothing here
            case Tick():
                self._tick(now)
            case Drain():
                self._leaving = True
        while self._proceed(now):
            pass
        if self._leaving and not (self.seqs or self._steps) and self.source.is_empty() and self.sink.is_empty():
            self._leaving = False
            self._orders.append(Drained(self.spec.name))
        orders = self._orders.copy()
        self._orders.clear()
        return orders

    def _proceed(self, now: float) -> bool:
        """Hand out memory and plan steps; True if planning took memory back, or met a want that held others up."""
        starved, num_freed = self.memory.starved, self.memory.num_freed
        self.memory.grant(now)
        self._compose(now)
        return num_freed != self.memory.num_freed or (starved is not None and self.memory.starved is None)

    def next_deadline(self) -> float | None:
        """When a Tick is wanted next, if at all."""
        times = [part.next_deadline() for part in (self.source, self.sink, self.keep, self.copies)]
        return min((time for time in times if time is not None), default=None)

    def horizon(self) -> int:
        """How often the step just ordered may be repeated before any decision could change."""
        if len(self._steps) != 1 or self.spec.depth > 1 or self.spec.itl_budget_s is not None:
            return 1
        (slices,) = self._steps.values()
        return repeats(slices, self.seqs, self.running, self.pool)

    @property
    def num_preempted(self) -> int:
        """How often a running sequence lost its memory to an older one."""
        return self.memory.num_preempted

    def idle_reason(self) -> str:
        """Why no step is being computed: "" while one is, "no work", or what is waited for."""
        return "" if self._steps else "memory" if self.claims else "a peer" if self.seqs else "no work"

    def partner(self, rid: int) -> str:
        """The peer that an attempt is shared with here: nobody else has a say in it. "" where none is known."""
        seq = self.seqs.get(rid)
        return (seq.peer if seq else "") or self.source.reader(rid) or self.keep.reader(rid) or self.copies.reader(rid)

    # --- coming in -----------------------------------------------------------------------------------------------

    def _place(self, now: float, place: Place) -> None:
        seq = self.seqs[place.rid] = Sequence(place, now)
        if self.pool.blocks_for(seq.target - 1) > self.pool.num_blocks:  # the last token's KV is never written
            self._end(now, seq, Reason.REFUSED)
        elif place.part == Role.DECODE:
            self.receiver.expect(seq, now)
        else:
            self.keep.wait(place.rid)
            earlier = self._earlier(now, place)
            if earlier is None:
                self.memory.queue(seq)
            else:
                self._successors[earlier] = seq

    def _earlier(self, now: float, place: Place) -> int | None:
        """An earlier attempt that still has its blocks here: what it computed is worth waiting for."""
        for attempt in range(place.rid % MAX_ATTEMPTS):
            rid = place.rid - 1 - attempt
            seq = self.seqs.get(rid)
            if seq is not None and seq.part == Role.PREFILL and seq.ended is None:
                self._end(now, seq, Reason.SUPERSEDED)
            if rid in self.source or (seq is not None and seq.inflight and seq.part == Role.PREFILL):
                return rid
        return None

    # --- stepping ------------------------------------------------------------------------------------------------

    def _compose(self, now: float) -> None:
        memory = self.memory
        while len(self._steps) < self.spec.depth:
            memory.starved = None
            slices = compose(self.running, self.pool, self.spec, self.times, lambda seq: memory.make_room(now, seq))
            if not slices and memory.yield_memory(now):
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
            fast_forward([self.seqs[piece.rid] for piece in slices], event.count, self.pool)
        for rid, digest in event.filled:
            self.seqs[rid].hashes.append(digest)
        for piece in slices:
            seq = self.seqs[piece.rid]
            seq.inflight -= 1
            seq.computed = piece.start + piece.count + event.count - 1
            self.memory.seal(seq)
            if seq.ended is not None:
                if seq.inflight == 0:
                    self._let_go(now, seq)
                continue
            if piece.sample:
                self._sampled(now, seq, event.count, piece.rid in event.finished)
                self._orders += self.copies.copy(seq, now) if seq.ended is None else []
            elif seq.offers:
                self._orders += self.source.publish(seq, now, final=False)

    def _sampled(self, now: float, seq: Sequence, count: int, stopped: bool) -> None:
        """It wrote `count` tokens of its answer, or has come to the end of a prompt that has none."""
        if seq.max_new:
            self._orders.append(Emit(seq.rid, seq.emitted, count))
        seq.emitted += count
        if stopped or seq.emitted >= seq.max_new:
            full = Reason.LENGTH if seq.max_new else Reason.COMPUTED
            self._end(now, seq, Reason.STOP if stopped else full)
        elif seq.part == Role.PREFILL:
            self.running.remove(seq)
            seq.life.climb(Rung.HANDOVER, now)
            self._orders += self.source.publish(seq, now, final=True)
        else:
            seq.life.climb(Rung.DECODING, now)

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

    def _dropped(self, now: float, event: Drop) -> None:
        seq = self.source.drop(event.rid)
        if seq is not None:
            self._unfence(now, seq, Reason.HANDED_OVER if seq.life.at == Rung.HANDOVER else Reason.CANCELLED)
        else:
            self._copy_no_more(event.rid)
        if not event.kept:
            self._orders += self.keep.release(event.rid)

    def _copy_no_more(self, rid: int) -> None:
        """Its keeper wants no more of it."""
        self.copies.stop(rid)
        if rid in self.seqs:
            self.seqs[rid].copied = None

    def _unfence(self, now: float, seq: Sequence, reason: Reason) -> None:
        """Nobody reads its blocks any more."""
        if seq.rid in self.seqs:
            self._end(now, seq, reason)
        else:
            self._give_back(now, seq)

    def _peer_lost(self, now: float, peer: str) -> None:
        self._orders += self.keep.lose(peer, now)
        self.copies.lose(peer)
        for seq in self.seqs.values():
            if seq.keeper == peer:
                seq.keeper, seq.copied = "", None
        for seq in self.source.lose(peer):
            self._unfence(now, seq, Reason.PEER_LOST)
        for seq in [seq for seq in self.claims if seq.part == Role.PREFILL and seq.peer == peer]:
            self._end(now, seq, Reason.PEER_LOST)
        self.receiver.lose(now, peer)

    # --- going out -----------------------------------------------------------------------------------------------

    def _tick(self, now: float) -> None:
        for seq in self.source.expire(now):
            self._unfence(now, seq, Reason.EXPIRED)
        self._orders += self.keep.expire(now)
        for rid in self.copies.expire(now):
            self._copy_no_more(rid)
        self._orders += self.sink.beat(now)
        self._orders += self.sink.decline(now)

    def _cancel(self, now: float, rid: int) -> None:
        self.sink.ignore(rid)
        seq = self.seqs.get(rid)
        if seq is not None and seq.ended is None:
            self._end(now, seq, Reason.CANCELLED)

    def _end(self, now: float, seq: Sequence, reason: Reason) -> None:
        """It goes no further here, and says so at once; while a step in flight carries it, it keeps its blocks."""
        if seq.ended is None:
            seq.ended = reason
            seq.life.climb(_LAST.get(reason, Rung.FAILED), now)
            self._orders.append(Finish(seq.rid, self.spec.name, reason, seq.life.durations()))
            if seq.keeper and reason in _LAST and not self.sink.release(seq.rid):
                self._orders.append(Release(seq.keeper, seq.rid))
        if seq.inflight == 0:
            self._let_go(now, seq)

    def _let_go(self, now: float, seq: Sequence) -> None:
        """Give back what an ended sequence holds, but for what a peer may still read."""
        self.memory.leave(seq)
        coming = self.sink.get(seq.rid)
        if coming is not None:
            self._orders += self.sink.forget(coming, now, drop=seq.ended != Reason.PEER_LOST)
        elif seq.rid in self.source and (revoke := self.source.revoke(seq, now)):
            self._orders.append(revoke)
        else:
            self._give_back(now, seq)
        del self.seqs[seq.rid]

    def _give_back(self, now: float, seq: Sequence) -> None:
        """Release its blocks; what its request may come back for is kept."""
        successor = self._successors.pop(seq.rid, None)
        if seq.offers and seq.blocks and (successor is not None or seq.ended in _KEPT):
            self._orders += self.keep.take(seq, now, orphan=seq.ended != Reason.HANDED_OVER)
        else:
            self.keep.wait_no_more(seq.rid, now)
        self.memory.release(seq)
        if successor is not None and successor.ended is None:
            self.memory.queue(successor)


_LAST = {
    Reason.STOP: Rung.FINISHED,
    Reason.LENGTH: Rung.FINISHED,
    Reason.COMPUTED: Rung.FINISHED,
    Reason.HANDED_OVER: Rung.FINISHED,
    Reason.CANCELLED: Rung.CANCELLED,
}
"""The rung on which a sequence ends here, by reason; anything else failed."""

_KEPT = (Reason.HANDED_OVER, Reason.PEER_LOST, Reason.EXPIRED, Reason.SUPERSEDED)
"""Why a prefill side ends what may go on with what it computed."""
