"""A worker's every decision: `on(now, event) -> orders`.

One class for prefill, decode and mixed workers; the part a request is to have here comes with its `Place`. The life of
a sequence on this worker:

    Place --> claims --(memory)--> running --(steps)--> finished              part mixed (`memory.py`, `batching.py`)
    Place --> claims --(memory)--> running --> offered --(Done)--> finished   part prefill (`source.py`)
    Place --> incoming --(reads)--> running --> finished                      part decode (`sink.py`)

Not responsible for computing, moving bytes, waiting or reading a clock.
"""

from diptych.policy.batching import WorkerSpec, compose, fast_forward, repeats
from diptych.policy.blocks import BlockPool
from diptych.policy.ladder import Rung
from diptych.policy.membership import Drain, Drained
from diptych.policy.memory import Memory
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


class Worker:
    """The policy of one worker. Feed it events in order; do what it orders, in order."""

    def __init__(self, spec: WorkerSpec):
        self.spec = spec
        self.pool = BlockPool(spec.num_blocks, spec.block_size)
        self.times = StepTimes()
        self.source = Source(self.pool, spec.lease_s)
        self.sink = Sink(self.pool, spec.lease_s)
        self.seqs: dict[int, Sequence] = {}  # everything placed here that has not ended, or is still in a step
        self._steps: dict[int, tuple[Slice, ...]] = {}
        self._next_step = 0
        self._leaving = False  # asked to say when nothing is left here; nothing more is placed
        self._orders: list[WorkerOrder] = []
        self.memory = Memory(spec, self.pool, self.source, self.sink, self.times, self._steps, self._orders)
        self.claims = self.memory.claims
        self.running = self.memory.running

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
        times = [t for t in (self.source.next_deadline(), self.sink.next_deadline()) if t is not None]
        return min(times, default=None)

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

    # --- coming in -----------------------------------------------------------------------------------------------

    def _place(self, now: float, place: Place) -> None:
        seq = Sequence(place, now)
        self.seqs[seq.rid] = seq
        if self.pool.blocks_for(seq.target - 1) > self.pool.num_blocks:  # the last token's KV is never written
            self._end(now, seq, Reason.REFUSED)
        elif place.part == Role.DECODE:
            for event in self.sink.expect(seq, now):
                self._published(now, event)
        else:
            self.memory.queue(seq)

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
            if seq.ended is not None:
                if seq.inflight == 0:
                    self._let_go(now, seq)
                continue
            seq.computed = piece.start + piece.count + event.count - 1
            self.memory.seal(seq)
            if piece.sample:
                self._sampled(now, seq, event.count, piece.rid in event.finished)
            elif seq.part == Role.PREFILL:
                self._orders += self.source.publish(seq, now, final=False)

    def _sampled(self, now: float, seq: Sequence, count: int, stopped: bool) -> None:
        """It wrote `count` tokens of its answer."""
        self._orders.append(Emit(seq.rid, seq.emitted, count))
        seq.emitted += count
        if stopped or seq.emitted >= seq.max_new:
            self._end(now, seq, Reason.STOP if stopped else Reason.LENGTH)
        elif seq.part == Role.PREFILL:
            self.running.remove(seq)
            seq.life.climb(Rung.HANDOVER, now)
            self._orders += self.source.publish(seq, now, final=True)
        else:
            seq.life.climb(Rung.DECODING, now)

    # --- handover: decode side -----------------------------------------------------------------------------------

    def _published(self, now: float, event: Publish) -> None:
        coming = self.sink.published(event)
        if coming is None:
            if event.rid not in self.seqs:
                self.sink.keep(event, now)
        elif coming.broken:
            self._orders += self.sink.give_up(coming, now)
            self._broken(now, coming)
        elif coming.lacks or not coming.pledged:
            self.memory.claim(coming)
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
        self.memory.unclaim(coming)
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
        self.memory.seal(seq)
        seq.life.climb(Rung.DECODING, now)
        self.memory.start(seq)

    def _recompute(self, now: float, coming: Incoming, drop: bool) -> None:
        """Its KV could not be read: compute it here, from the tokens, which the driver has."""
        seq = coming.seq
        self.memory.unclaim(coming)
        self._orders += self.sink.forget(coming, now, drop)
        seq.arrived()
        seq.restart()
        seq.life.climb(Rung.QUEUED, now)
        self.memory.queue(seq)

    def _revoked(self, now: float, event: Revoke) -> None:
        self.sink.ignore(event.rid)
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
            self.memory.release(seq)

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
        self._orders += [*self.sink.beat(now), *self.sink.decline(now)]

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
            self.memory.release(seq)
        del self.seqs[seq.rid]


_LAST = {
    Reason.STOP: Rung.FINISHED,
    Reason.LENGTH: Rung.FINISHED,
    Reason.HANDED_OVER: Rung.FINISHED,
    Reason.CANCELLED: Rung.CANCELLED,
}
"""The rung on which a sequence ends here, by reason; anything else failed."""
