"""What a worker does about KV that is read into its memory: as the decode side of handovers, and as a keeper.

Not responsible for keeping track of reads (`sink.py` and `keep.py` do), nor for who gets memory (`memory.py`).
"""

from collections.abc import Callable

from diptych.policy.handover import Meter
from diptych.policy.keep import Keep
from diptych.policy.ladder import Rung
from diptych.policy.memory import Memory
from diptych.policy.messages import Answer, Drop, Publish, Read, Reason, Revoke, WorkerOrder
from diptych.policy.sequence import Sequence
from diptych.policy.sink import Incoming, Sink


class Receiver:
    """Belongs to one worker. `seqs` and `orders` are the worker's; `end(now, seq, reason)` ends a sequence there.

    replicate: what is accepted is copied back to its source as it grows. meter: hears how fast reads were.
    """

    def __init__(
        self,
        sink: Sink,
        keep: Keep,
        memory: Memory,
        seqs: dict[int, Sequence],
        orders: list[WorkerOrder],
        end: Callable[[float, Sequence, Reason], None],
        replicate: bool,
        meter: Meter,
    ):
        self._sink = sink
        self._keep = keep
        self._memory = memory
        self._seqs = seqs
        self._orders = orders
        self._end = end
        self._replicate = replicate
        self._meter = meter

    def expect(self, seq: Sequence, now: float) -> None:
        """A sequence was placed here whose KV comes from its peer."""
        for event in self._sink.expect(seq, now):
            self.published(now, event)

    def published(self, now: float, event: Publish) -> None:
        """More of a sequence is ready at its source."""
        coming = self._sink.published(event)
        if coming is None:
            if event.rid not in self._seqs:
                self._orders += self._sink.keep(event, now)
        elif coming.broken:
            self._orders += self._sink.give_up(coming, now)
            self._broken(now, coming)
        elif coming.lacks or not coming.pledged:
            self._memory.claim(coming)
        else:
            self._orders += self._sink.ask(coming)

    def read(self, now: float, event: Read) -> None:
        """A read is over and verified."""
        pull = event.pull
        if self._keep.reads(pull):
            self._orders += self._keep.read(pull)
            return
        coming = self._sink.read(pull, now)
        if coming:
            self._orders += self._meter.read(now, coming.seq.peer, event.num_bytes, event.elapsed_s)
        self._orders += self._sink.ask(coming) if coming else self._sink.settled(pull, now)

    def read_failed(self, now: float, pull: int) -> None:
        """A read did not succeed."""
        if self._keep.reads(pull):
            self._orders += self._keep.failed(pull)
            return
        coming, orders = self._sink.failed(pull, now)
        self._orders += orders
        if coming is not None:
            self._broken(now, coming)

    def settled(self, now: float, pull: int) -> None:
        """Nothing of a read that was given up can land any more."""
        if self._keep.reads(pull):
            self._orders += self._keep.settled(pull)
            return
        self.read_failed(now, pull)  # if it settles without a word before
        self._orders += self._sink.settled(pull, now)

    def _broken(self, now: float, coming: Incoming) -> None:
        """It cannot be read: no memory for it until it is all known, then it is computed here."""
        self._memory.unclaim(coming)
        if coming.final:
            self._recompute(now, coming, drop=True)

    def answered(self, now: float, event: Answer) -> None:
        """What the source says to Done: ours, or too late."""
        coming = self._sink.get(event.rid)
        if coming is None or (event.ok and not coming.asked):
            return  # nobody asked
        if event.ok:
            self._follow(coming.seq, event.peer)
            self._accept(now, coming)
        elif coming.final:
            self._orders += self._sink.give_up(coming, now)
            self._recompute(now, coming, drop=False)
        else:
            self._end(now, coming.seq, Reason.PEER_LOST)  # the source does not know it: its process is a new one

    def _accept(self, now: float, coming: Incoming) -> None:
        seq = self._sink.accept(coming.seq.rid, now)
        seq.arrived()
        self._memory.seal(seq)
        seq.life.climb(Rung.DECODING, now)
        self._memory.start(seq)

    def _follow(self, seq: Sequence, keeper: str) -> None:
        """Its source keeps the prompt's KV, and may have the answer's as it grows."""
        seq.keeper = keeper
        seq.copied = seq.num_tokens // self._memory.pool.block_size if self._replicate else None

    def _recompute(self, now: float, coming: Incoming, drop: bool) -> None:
        """Its KV could not be read: compute it here, from the tokens, which the driver has. drop: its source lives."""
        seq = coming.seq
        self._memory.unclaim(coming)
        self._orders += self._sink.forget(coming, now, drop, kept=drop)
        if drop:
            self._follow(seq, seq.peer)
        seq.arrived()
        seq.restart()
        seq.life.climb(Rung.QUEUED, now)
        self._memory.queue(seq)

    def revoked(self, now: float, event: Revoke) -> None:
        """The source asks that reading stop; it hears Drop when it has."""
        self._sink.ignore(event.rid, event.peer)
        coming = self._sink.get(event.rid)
        if coming is None:
            if not self._sink.settling(event.rid):
                self._orders.append(Drop(event.peer, event.rid))
        else:
            self._end(now, coming.seq, Reason.CANCELLED)

    def lose(self, now: float, peer: str) -> None:
        """A source is gone. What was read whole is used; of the rest what is known is computed here."""
        self._meter.forget(peer)
        for coming in self._sink.of_peer(peer):
            if coming.asked:  # verified by checksum: it needs no answer from the dead
                self._accept(now, coming)
            elif coming.final:
                self._orders += [] if coming.broken else self._sink.give_up(coming, now)
                self._recompute(now, coming, drop=False)
            else:
                self._end(now, coming.seq, Reason.PEER_LOST)
