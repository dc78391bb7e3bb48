"""The live driver of `policy/worker.py`: hands it events, and does what it orders through five ports.

Keeps what policy must not see: token ids, sampling parameters, checksums. The same class runs in a worker process
(`worker_process.py`: sockets, threads) and in one process for tests and offline use (`local.py`: a queue). Not
responsible for waiting, nor for any decision.
"""

from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from diptych.engine.executor import Result, Sampling, Score
from diptych.errors import ProtocolError
from diptych.journal import Journal
from diptych.policy.hashes import HASH_BYTES, block_hashes, chain
from diptych.policy.membership import Drained
from diptych.policy.messages import (
    Beat,
    CancelPull,
    Emit,
    Finish,
    Handover,
    Place,
    Publish,
    Pull,
    Purpose,
    Read,
    ReadFailed,
    Reason,
    Retention,
    Role,
    Run,
    StepDone,
    WorkerEvent,
    WorkerOrder,
)
from diptych.policy.retention import Replicate
from diptych.policy.worker import Worker
from diptych.serve.wire import Extra, check_ids, pack_emit, pack_ids, unpack_ids, unpack_sums, unpack_ticket
from diptych.transfer.seam import Plan

MAX_BLOCKS = 1 << 31  # of a pool: they are counted in int32
MAX_EARLY = 1024  # requests a peer may speak of before our own Place comes

ToPeer = Handover | Retention


class Ports(Protocol):
    """What a worker's driver asks of the world around it. No call waits."""

    def admit(self, rid: int, tokens: list[int], num_prompt: int, sampling: Sampling) -> None:
        """Tell the executor of a sequence."""

    def extend(self, rid: int, tokens: list[int]) -> None:
        """Tell the executor of tokens computed elsewhere."""

    def forget(self, rid: int) -> None:
        """Tell the executor to drop a sequence."""

    def run(self, step: Run) -> None:
        """Compute a step; `Driver.ran` takes the result."""

    def tell(self, peer: str, message: ToPeer, attachment: bytes) -> None:
        """Send to a peer."""

    def report(self, message: Emit | Finish | Drained, attachment: bytes) -> None:
        """Send to the router."""

    def checksum(self, blocks: NDArray[np.int32]) -> NDArray[np.uint64]:
        """uint64 [n]: checksums of our own blocks, int32 [n]."""

    def pull(self, order: Pull, plan: Plan) -> None:
        """Start a read; `Driver.on` is to hear Read, or ReadFailed and Settled."""

    def cancel_pull(self, pull: int) -> None:
        """Ask a read to stop; `Driver.on` is to hear Settled (or Read, if it was done already)."""


@dataclass(slots=True)
class Held:
    """What the driver remembers of one attempt at a request."""

    tokens: "array[int]"
    num_prompt: int
    hashed: int  # leading full blocks whose hash policy knows
    parent: bytes  # the hash of the last of them
    expects: str  # the peer its KV comes from, until the last of it is published
    checksums: "array[int]"  # of the peer's published blocks, in order
    counts_cache: bool  # its prompt is computed here, and how much of it was found is not known yet
    num_known: int  # tokens when it was placed here
    cached: int = 0
    scores: dict[int, Score] = field(default_factory=dict)  # of tokens not emitted yet, by position
    prompt_scores: list[Score] = field(default_factory=list)  # until the first token is emitted
    vector: bytes = b""  # what came of a prompt after which nothing is written


class WorkerDriver:
    """Drives one policy object. All calls come from one thread."""

    def __init__(
        self,
        policy: Worker,
        ports: Ports,
        clock: Callable[[], float],
        journal: Journal | None,
        vocab_size: int = 1 << 31,
    ):
        self.policy = policy
        self._vocab_size = vocab_size
        self.num_steps = 0
        self._last_step: float | None = None  # when one was last done
        self.num_kv_bytes = self.num_transfers = self.num_failed = 0
        self.kv_seconds = 0.0
        self.resumed = dict.fromkeys(("requests", "prompt_tokens", "written_tokens"), 0)  # computed again, after a loss
        self._ports = ports
        self._clock = clock
        self._journal = journal
        self._held: dict[int, Held] = {}
        self._steps: dict[int, Run] = {}
        self._copied: dict[tuple[str, int], int] = {}  # checksums of blocks that peers let us replicate
        self._early: OrderedDict[int, list[tuple[Publish, bytes]]] = OrderedDict()  # what came before its Place

    def told(self, peer: str, event: ToPeer, attachment: bytes | memoryview = b"") -> None:
        """A peer says something. Raises ProtocolError, with nothing changed, where that is none of its business."""
        if event.peer != peer:
            raise ProtocolError(f"{peer} speaks for {event.peer}")
        for rid in event.rids if isinstance(event, Beat) else (event.rid,):
            if self.policy.partner(rid) not in (peer, ""):
                raise ProtocolError(f"attempt {rid} is shared with {self.policy.partner(rid)}, not with {peer}")
        match event:
            case Publish():
                self._check_published(event, attachment)
            case Replicate():
                if [len(digest) for digest in event.hashes] != [HASH_BYTES] * len(event.blocks):
                    raise ProtocolError(f"{len(event.blocks)} blocks, and not as many hashes")
                _check_blocks(event.blocks)
                unpack_sums(attachment, len(event.blocks))
        self.on(event, attachment)

    def _check_published(self, event: Publish, attachment: bytes | memoryview) -> None:
        """A checksum for each block; with the last of them the first token."""
        _check_blocks(event.blocks)
        num_sums = 8 * len(event.blocks)
        unpack_sums(attachment[:num_sums], len(event.blocks))
        first = unpack_ids(attachment[num_sums:])
        check_ids(first, self._vocab_size)
        if len(first) != event.final:
            raise ProtocolError(f"{len(first)} tokens with a Publish whose 'final' is {event.final}")
        held = self._held.get(event.rid)
        if held is not None:
            if not held.expects:
                raise ProtocolError(f"nothing of attempt {event.rid} is to be published here (any more)")
        elif len(self._early.get(event.rid, ())) >= MAX_EARLY:
            raise ProtocolError(f"attempt {event.rid} is not here, and {MAX_EARLY} parts of it are known")

    def on(self, event: WorkerEvent, attachment: bytes | memoryview = b"") -> None:
        """Take in an event: hand it to policy, and do what it orders."""
        match event:
            case Place():
                event = self._placed(event, attachment)
            case Publish():
                self._published(event, attachment)
            case Replicate():
                self._copied |= zip(
                    [(event.peer, block) for block in event.blocks],
                    unpack_sums(attachment, len(event.blocks)),
                    strict=True,
                )
            case Read():
                self.num_transfers += 1
                self.num_kv_bytes += event.num_bytes
                self.kv_seconds += event.elapsed_s
            case ReadFailed():
                self.num_failed += 1
        self._decide(event)

    def ran(self, step: int, result: Result) -> None:
        """The executor is done with a step."""
        run = self._steps.pop(step)
        self.num_steps += 1
        self._last_step = self._clock()
        self._keep_scores(result)
        for rid, vector in result.vectors.items():
            if rid in self._held:
                self._held[rid].vector = vector
        for rid, token, _ in result.tokens:
            if rid in self._held:
                self._held[rid].tokens.append(token)
        finished = tuple(rid for rid, _, ended in result.tokens if ended)
        self._decide(StepDone(step, result.elapsed_s, 1, finished, self._filled(run)))

    def _keep_scores(self, result: Result) -> None:
        for rid, score in result.scores.items():
            if rid in self._held:
                held = self._held[rid]
                held.scores[len(held.tokens)] = score
        for rid, (first, scores) in result.prompt_scores.items():
            if rid in self._held:
                known = self._held[rid].prompt_scores
                known += scores[1 + len(known) - first :]  # what is computed again after a preemption was scored before

    def _decide(self, event: WorkerEvent) -> None:
        now = self._clock()
        orders = self.policy.on(now, event)
        if self._journal is not None:
            self._journal.record(now, event, orders)
        for order in orders:
            self._do(order)

    def _do(self, order: WorkerOrder) -> None:
        match order:
            case Run():
                self._steps[order.step] = order
                self._note_cached(order)
                self._ports.run(order)
            case Emit():
                self._ports.report(order, self._emitted(self._held[order.rid], order))
            case Finish():
                held = self._held.pop(order.rid, None)
                self._ports.forget(order.rid)
                came = held if order.reason == Reason.COMPUTED else None
                self._ports.report(order, pack_emit(b"", Extra(came.cached, vector=came.vector)) if came else b"")
            case Publish():
                self._tell(order, self._describe(order))
            case Replicate():
                self._tell(order, self._sums(order.blocks))
            case Pull():
                source, target = np.array(order.source, np.int32), np.array(order.target, np.int32)
                self._ports.pull(order, Plan(source, target, np.array(self._expected(order), np.uint64)))
            case CancelPull(pull=pull):
                self._ports.cancel_pull(pull)
            case Drained():
                self._ports.report(order, b"")
            case _:
                self._tell(order, b"")

    def _expected(self, order: Pull) -> Iterable[int]:
        """The checksums of the blocks that are to be read."""
        if order.purpose == Purpose.REPLICA:
            # 0: named twice, which a peer that knows its own blocks does not; what is read will not match.
            return [self._copied.pop((order.peer, block), 0) for block in order.source]
        return self._held[order.rid].checksums[order.first : order.first + len(order.source)]

    def _note_cached(self, run: Run) -> None:
        """A sequence that starts behind its first token does so because its prefix was found."""
        for piece in run.slices:
            if piece.admit:
                held = self._held[piece.rid]
                if held.counts_cache:
                    held.cached = min(piece.start, held.num_prompt)
                    self._note_resumed(held, piece.start)
                held.counts_cache = False

    def _note_resumed(self, held: Held, start: int) -> None:
        """Count what an attempt that goes on elsewhere has to compute again. The last token is always computed."""
        if held.num_known > held.num_prompt:
            self.resumed["requests"] += 1
            self.resumed["prompt_tokens"] += max(held.num_prompt - start, 0)
            self.resumed["written_tokens"] += max(held.num_known - 1 - max(start, held.num_prompt), 0)

    def _emitted(self, held: Held, order: Emit) -> bytes:
        """The attachment of an Emit: token ids, and what else is known of them."""
        start = held.num_prompt + order.first
        places = range(start, start + order.count)
        ids = held.tokens[start : start + order.count].tobytes()
        scores = tuple(held.scores.pop(place) for place in places if place in held.scores)
        if order.first > 0:
            return pack_emit(ids, Extra(0, scores))
        return pack_emit(ids, Extra(held.cached, scores, tuple(held.prompt_scores)))

    def _tell(self, order: ToPeer, attachment: bytes) -> None:
        """Send a peer what is for it; it hears our name in place of its own."""
        self._ports.tell(order.peer, replace(order, peer=self.policy.spec.name), attachment)

    def _placed(self, place: Place, attachment: bytes | memoryview) -> Place:
        """Take in an attempt; returns it with the hashes of the blocks that earlier attempts filled."""
        ticket = unpack_ticket(attachment)
        tokens = array("i")
        tokens.frombytes(ticket.tokens)
        size = self.policy.spec.block_size
        parent = place.hashes[-1] if place.hashes else ticket.root
        if len(place.hashes) >= place.num_prompt // size:  # else no prefix of it is to be found
            written = block_hashes(tokens[len(place.hashes) * size :], size, parent)
            parent = written[-1] if written else parent
            place = replace(place, hashes=place.hashes + written)
        computes = place.part != Role.DECODE
        self._held[place.rid] = Held(
            tokens,
            ticket.num_prompt,
            len(place.hashes),
            parent,
            "" if computes else place.peer,
            array("Q"),
            computes,
            len(tokens),
        )
        self._ports.admit(place.rid, tokens.tolist(), ticket.num_prompt, ticket.sampling)
        for publish, early in self._early.pop(place.rid, []):
            self._published(publish, early)
        return place

    def _published(self, event: Publish, attachment: bytes | memoryview) -> None:
        held = self._held.get(event.rid)
        if held is None:
            self._early.setdefault(event.rid, []).append((event, bytes(attachment)))
            if len(self._early) > MAX_EARLY:
                self._early.popitem(last=False)
        elif held.expects == event.peer:  # what came before the Place may be anybody's
            held.expects = "" if event.final else held.expects
            self._attach(event.rid, bytes(attachment))

    def _describe(self, order: Publish) -> bytes:
        """The attachment of a Publish: the blocks' checksums, then (final) the first token as one more number."""
        first = pack_ids([self._held[order.rid].tokens[-1]]) if order.final else b""
        return self._sums(order.blocks) + first

    def _sums(self, blocks: tuple[int, ...]) -> bytes:
        return self._ports.checksum(np.array(blocks, np.int32)).tobytes() if blocks else b""

    def _attach(self, rid: int, data: bytes) -> None:
        held = self._held[rid]
        num_sums = len(data) // 8
        held.checksums.frombytes(data[: 8 * num_sums])
        first = unpack_ids(data[8 * num_sums :])
        if first:
            held.tokens.extend(first)
            self._ports.extend(rid, first)

    def _filled(self, run: Run) -> tuple[tuple[int, bytes], ...]:
        """Hashes of the blocks that became full of computed tokens and that policy does not know yet."""
        size = self.policy.spec.block_size
        filled = []
        for piece in run.slices:
            held = self._held.get(piece.rid)
            while held is not None and (held.hashed + 1) * size <= piece.start + piece.count:
                start = held.hashed * size
                held.parent = chain(held.parent, held.tokens[start : start + size])
                held.hashed += 1
                filled.append((piece.rid, held.parent))
        return tuple(filled)

    def state(self) -> dict[str, Any]:
        """What `/workers` shows of this worker."""
        policy = self.policy
        return {
            "role": str(policy.spec.role),
            "running": len(policy.running),
            "waiting": len(policy.claims),
            "requests": len(policy.seqs),
            "idle": policy.idle_reason(),
            "preempted": policy.num_preempted,
            "kept": len(policy.keep),
            "resumed": self.resumed,
            "steps": self.num_steps,
            "last_step_s": None if self._last_step is None else round(self._clock() - self._last_step, 3),
            "blocks": policy.pool.counts(),
            "balanced": policy.pool.balanced(),
            "journal_lost": self._journal.num_lost if self._journal is not None else 0,
            "kv": {
                "bytes": self.num_kv_bytes,
                "seconds": self.kv_seconds,
                "transfers": self.num_transfers,
                "failed": self.num_failed,
            },
        }


def _check_blocks(blocks: tuple[int, ...]) -> None:
    """Indices as a plan takes them; whether a pool has them is seen before a byte moves."""
    if max(blocks, default=0) >= MAX_BLOCKS:
        raise ProtocolError(f"block {max(blocks)} is in no pool")
