"""Who gets blocks: one queue for everyone who needs them, oldest first, and who gives them back when there are none.

A prompt that wants to start, a sequence that lost its memory, and ready parts of incoming KV stand in `claims` alike,
and nobody overtakes. A running answer that needs its next block does not stand in line: the youngest sequence pays for
it. Only KV that exists at a source is given memory here, and a source never waits for a sink, so no circle of waiting
can close.

Not responsible for which block is which (`blocks.py`), nor for what runs (`batching.py`).
"""

from bisect import insort

from diptych.policy.batching import WorkerSpec
from diptych.policy.blocks import BlockPool
from diptych.policy.keep import Keep
from diptych.policy.ladder import Rung
from diptych.policy.messages import Role, Slice, WorkerOrder, request_of
from diptych.policy.pace import StepTimes
from diptych.policy.sequence import Sequence, age
from diptych.policy.sink import Incoming, Sink
from diptych.policy.source import Source


class Memory:
    """The blocks of one worker and the two queues around them. Orders go to the list it was given.

    steps: those in flight, kept by the worker; while there are any, memory may come back by itself.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        pool: BlockPool,
        source: Source,
        sink: Sink,
        keep: Keep,
        times: StepTimes,
        steps: dict[int, tuple[Slice, ...]],
        orders: list[WorkerOrder],
    ):
        self.pool = pool
        self.claims: list[Sequence] = []  # those that need memory before they can go on, oldest first
        self.running: list[Sequence] = []  # those with memory for every token known so far, oldest first
        self.starved: Sequence | None = None  # the oldest that could not decode for want of a block
        self.num_freed = 0  # how often a sequence had its memory taken back
        self.num_preempted = 0  # those of them that were running
        self._spec = spec
        self._source = source
        self._sink = sink
        self._keep = keep
        self._times = times
        self._steps = steps
        self._orders = orders

    def queue(self, seq: Sequence) -> None:
        """It needs memory before it can go on."""
        insort(self.claims, seq, key=age)

    def start(self, seq: Sequence) -> None:
        """It has memory for every token known so far."""
        insort(self.running, seq, key=age)

    def leave(self, seq: Sequence) -> None:
        """It neither runs nor waits any more; what it holds is not touched."""
        for queue in (self.running, self.claims):
            if seq in queue:
                queue.remove(seq)

    def release(self, seq: Sequence) -> None:
        """Its blocks are nobody's now; the last ones are reused first, so that beginnings stay known longest."""
        self.pool.release(reversed(seq.blocks))

    def seal(self, seq: Sequence) -> None:
        """Make known the blocks that are full now, for others with the same prefix."""
        full = min(seq.computed // self.pool.block_size, len(seq.hashes))
        for i in range(seq.sealed, full):
            self.pool.seal(seq.blocks[i], seq.hashes[i])
        seq.sealed = max(seq.sealed, full)

    def grant(self, now: float) -> None:
        """Give memory to those who need it, oldest first, until one cannot have what it needs."""
        starved = self.starved
        while self.claims:
            seq = self.claims[0]
            if starved is not None and starved.ended is None and starved.key < seq.key:
                return  # what becomes free is for whoever had it taken back for its sake
            coming = self._sink.get(seq.rid)
            if not (self._reserve(now, coming) if coming else self._admit(now, seq)):
                if self.running or self._steps or not self._sink.stuck() or not self._evict_youngest(now, seq):
                    return
                continue
            self.claims.remove(seq)

    def _admit(self, now: float, seq: Sequence) -> bool:
        """Memory for every token known so far, less the prefix this worker already holds."""
        pool = self.pool
        if not self._may_grow(seq) or (self.running and pool.num_available <= seq.tight):
            return False
        known, num_known = self._known(seq)
        need = pool.blocks_for(seq.num_tokens) - len(known)
        idle = sum(map(pool.is_idle, known))
        growth = 0 if seq.part == Role.PREFILL else min(len(self.running), pool.num_blocks // 50)
        if need + idle + growth > pool.num_available:
            seq.tight = pool.num_available
            return False
        pool.share(known)
        self._orders += self._keep.forget(request_of(seq.rid))
        seq.blocks = known + pool.take(need)
        seq.num_computed = seq.computed = num_known
        seq.sealed = num_known // pool.block_size
        seq.life.climb(Rung.PREFILLING, now)
        self.start(seq)
        if seq.offers:
            self._orders.append(self._source.open(seq))
        return True

    def _known(self, seq: Sequence) -> tuple[list[int], int]:
        """The blocks this worker already holds of it, and how many tokens' KV is in them."""
        size = self.pool.block_size
        known = self.pool.match(seq.hashes[: (seq.num_tokens - 1) // size])
        tail = self._keep.tail(seq.rid, len(known))
        if tail is None:
            return known, len(known) * size
        return [*known, tail[0]], min(tail[1], seq.num_tokens - 1)

    def _reserve(self, now: float, coming: Incoming) -> bool:
        """Memory for what is ready of an incoming sequence, and the order to read it."""
        if not self._may_grow(coming.seq):
            return False
        self._sink.pledge(coming)
        if coming.lacks > self.pool.num_available:
            return False
        if coming.lacks:
            self._orders.append(self._sink.reserve(coming, now))
        coming.claims = False
        self._orders += self._sink.ask(coming)
        return True

    def _may_grow(self, seq: Sequence) -> bool:
        """The batch may take one more: it is not full, and its steps stay inside the inter-token budget."""
        if len(self.running) >= self._spec.max_batch:
            return False
        budget = self._spec.itl_budget_s
        if budget is None or seq.part == Role.PREFILL:
            return True
        decodes = [other for other in self.running if other.decodes or other.inflight]
        context = sum(other.num_tokens for other in decodes) + seq.num_tokens
        return not decodes or self._times.predict(len(decodes) + 1, context) <= budget

    def make_room(self, now: float, seq: Sequence) -> bool:
        """Free a block for a decode that has none left, at the cost of whoever is youngest; False if it must wait."""
        if self.pool.num_quarantined:  # taken back already, and free as soon as no read can touch it
            self.starved = self.starved or seq
            return False
        others = [o for o in self.running if o.key > seq.key and not o.inflight and not o.offers and o.blocks]
        victim = max(others, key=age, default=None)
        coming = self._sink.youngest(seq.key)
        if coming is not None and (victim is None or coming.seq.key > victim.key):
            self._evict(now, coming)
        elif victim is not None:
            self._preempt(now, victim)
        if self.pool.num_available == 0:
            self.starved = self.starved or seq
        return self.pool.num_available > 0

    def yield_memory(self, now: float) -> bool:
        """Nobody who runs can go on, older KV on its way here holds what they lack: the youngest gives its own back."""
        if self._steps or not self.running or not self._sink.stuck():
            return False
        self._preempt(now, self.running[-1])
        self.grant(now)
        return bool(self.running)

    def _preempt(self, now: float, seq: Sequence) -> None:
        """Free all its blocks; it will compute its KV again when it is its turn."""
        self.num_preempted += 1
        self.num_freed += 1
        self.running.remove(seq)
        self.release(seq)
        seq.restart()
        seq.life.climb(Rung.QUEUED, now)
        self.queue(seq)

    def claim(self, coming: Incoming) -> None:
        """An incoming sequence needs memory for what is ready of it."""
        if not coming.claims:
            coming.claims = True
            self.queue(coming.seq)

    def unclaim(self, coming: Incoming) -> None:
        """It needs none (any more)."""
        if coming.claims:
            coming.claims = False
            self.claims.remove(coming.seq)

    def _evict(self, now: float, coming: Incoming) -> None:
        """Take back the memory of a sequence that is still on its way; it is read again when it is its turn."""
        self.num_freed += 1
        self._orders += self._sink.evict(coming, now)
        self.claim(coming)

    def _evict_youngest(self, now: float, seq: Sequence) -> bool:
        coming = self._sink.youngest(seq.key)
        if coming is not None:
            self._evict(now, coming)
        return coming is not None
