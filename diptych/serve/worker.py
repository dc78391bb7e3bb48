"""The live driver of `policy/worker.py`: hands it events, and does what it orders through five ports.

Keeps what policy must not see: token ids, sampling parameters, checksums, permits. The same class runs in a worker
process (`worker_process.py`: sockets, threads) and in one process for tests and offline use (`local.py`: a queue). Not
responsible for waiting, nor for any decision.
"""

import logging
from array import array
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from diptych.engine.executor import Result
from diptych.errors import ProtocolError
from diptych.journal import Journal
from diptych.policy.hashes import block_hashes
from diptych.policy.membership import Drained, LinkMeasured
from diptych.policy.messages import (
    Answer,
    Beat,
    Cancel,
    CancelPull,
    Done,
    Drop,
    Emit,
    Finish,
    PeerLost,
    Place,
    Publish,
    Pull,
    Purpose,
    Read,
    ReadFailed,
    Reason,
    Role,
    Run,
    Settled,
    StepDone,
    WorkerEvent,
    WorkerOrder,
)
from diptych.policy.retention import Replicate
from diptych.policy.worker import Worker
from diptych.serve.account import STALL_S, Accounts, cause_of
from diptych.serve.attached import Attached
from diptych.serve.held import Held, check_published, check_replicated
from diptych.serve.logs import about
from diptych.serve.permits import Permits
from diptych.serve.traffic import Traffic
from diptych.serve.wire import Extra, pack_emit, pack_ids, unpack_published, unpack_ticket
from diptych.serve.worker_ports import Ports, ToPeer
from diptych.transfer.seam import Plan, Stats

log = logging.getLogger(__name__)


class WorkerDriver:
    """Drives one policy object. All calls come from one thread; only `permits` may be asked from others."""

    def __init__(
        self,
        policy: Worker,
        ports: Ports,
        clock: Callable[[], float],
        journal: Journal | None,
        vocab_size: int = 1 << 31,
    ):
        self.policy = policy
        self.permits = Permits(policy)
        self._vocab_size = vocab_size
        self.num_steps = 0
        self._last_step: float | None = None  # when one was last done
        self._computing: float | None = None  # since when the executor computes the oldest step in flight
        self.traffic = Traffic()
        self.accounts = Accounts(ports.lane)
        self.resumed = dict.fromkeys(("requests", "prompt_tokens", "written_tokens"), 0)  # computed again, after a loss
        self._ports = ports
        self._clock = clock
        self._journal = journal
        self._held: dict[int, Held] = {}
        self._steps: dict[int, Run] = {}
        self.attached = Attached()

    def told(self, peer: str, event: ToPeer, attachment: bytes = b"") -> None:
        """A peer says something. Raises ProtocolError, with nothing changed, where that is none of its business."""
        if event.peer != peer:
            raise ProtocolError(f"{peer} speaks for {event.peer}")
        for rid in event.rids if isinstance(event, Beat) else (event.rid,):
            if self.policy.partner(rid) not in (peer, ""):
                raise ProtocolError(f"attempt {rid} is shared with {self.policy.partner(rid)}, not with {peer}")
        match event:
            case Publish():
                check_published(event, attachment, self._vocab_size)
                self._expect_part(event)
            case Replicate():
                check_replicated(event, attachment)
        self.on(event, attachment)

    def _expect_part(self, event: Publish) -> None:
        held = self._held.get(event.rid)
        if held is not None:
            if not held.expects:
                raise ProtocolError(f"nothing of attempt {event.rid} is to be published here (any more)")
        else:
            self.attached.expect_part(event.rid)

    def on(self, event: WorkerEvent, attachment: bytes = b"") -> None:
        """Take in an event: hand it to policy, and do what it orders."""
        match event:
            case Place():
                self.accounts.placed(self._clock(), event)
                event = self._placed(event, attachment)
            case Publish():
                self._published(event, attachment)
            case Replicate():
                self.attached.replicated(event, attachment)
            case Read():
                self.traffic.read(event)
                self.accounts.read(self._clock(), event)
            case ReadFailed(pull=pull, why=why):
                self.traffic.num_failed += 1
                rid = self.accounts.reading(pull)
                log.warning("KV could not be read: %s", why, extra=about(self.name_of(rid), rid))
            case Settled(pull=pull):
                self.accounts.settled(self._clock(), pull)
            case PeerLost(peer=peer):
                forget_peer(self, peer)
            case Cancel(rid=rid):
                self.attached.claim(rid)  # for nobody
            case Answer(rid=rid, ok=True) if coming := self.accounts.arriving(rid):
                coming.enter(self._clock(), "queue")
        self._decide(event)

    def name_of(self, rid: int) -> str:
        """What log lines call the request of an attempt; "" where it is none of ours (any more)."""
        return self._held[rid].name if rid in self._held else ""

    def travelled(self, rid: int, peer: str, stats: Stats) -> None:
        """How KV that was just read came: for people to see. Policy hears only that it did."""
        self.traffic.travelled(peer, stats)
        if rid in self._held:
            self._held[rid].codec, self._held[rid].why = stats.codec, stats.why

    def ran(self, step: int, result: Result) -> None:
        """The executor is done with a step."""
        run = self._steps.pop(step)
        self.num_steps += 1
        before, self._last_step = self._last_step, self._clock()
        self._computing = self._last_step if self._steps else None
        self._keep_scores(result)
        for rid, vector in result.vectors.items():
            if rid in self._held:
                self._held[rid].vector = vector
        for rid, token, _ in result.tokens:
            if rid in self._held:
                self._held[rid].tokens.append(token)
        if before is not None and self._last_step - before > STALL_S:
            self._note_late(run, result, cause_of(run, result.elapsed_s, self._last_step - before))
        finished = tuple(rid for rid, _, ended in result.tokens if ended)
        self._decide(StepDone(step, result.elapsed_s, 1, finished, self._filled(run)))

    def _note_late(self, run: Run, result: Result, cause: str) -> None:
        """A step ended long after the one before: who got a token from it has waited for it."""
        for rid, _, _ in result.tokens:
            held = self._held.get(rid)
            if held is not None:
                self.accounts.note(rid, len(held.tokens) - held.num_prompt - 1, cause)

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
                if not self._steps:
                    self._computing = self._clock()
                self._steps[order.step] = order
                self._note_cached(order)
                self.accounts.ordered(self._clock(), order)
                self._ports.run(order)
            case Emit():
                if order.rid in self.accounts:
                    self._account(order.rid)
                self._ports.report(order, self._emitted(self._held[order.rid], order))
            case Finish():
                self._account_end(order)
                held = self._held.pop(order.rid, None)
                self._ports.forget(order.rid)
                came = held if order.reason == Reason.COMPUTED else None
                self._ports.report(order, pack_emit(b"", Extra(came.cached, vector=came.vector)) if came else b"")
            case Publish():
                self._tell(order, self._describe(order))
            case Replicate():
                self._tell(order, self._offered(order))
            case Pull():
                self.accounts.pulled(self._clock(), order)
                self._ports.pull(order, self._plan(order))
            case CancelPull(pull=pull):
                self._ports.cancel_pull(pull)
            case Drained() | LinkMeasured():
                self._ports.report(order, b"")
            case Drop(peer=peer, rid=rid):
                self.attached.dropped(peer, rid)
                self._tell(order, b"")
            case _:
                if isinstance(order, Done) and (coming := self.accounts.arriving(order.rid)):
                    coming.enter(self._clock(), "answer")
                self._tell(order, b"")

    def _account(self, rid: int) -> None:
        """Tell the router what was measured until the first token that this worker adds."""
        self._ports.report(self.accounts.close(self._clock(), rid, self._held[rid].cached), b"")

    def _account_end(self, order: Finish) -> None:
        """The same where nothing was to be written, and what held tokens up where something was."""
        if order.reason == Reason.COMPUTED and order.rid in self.accounts:
            self._account(order.rid)
        stalls = self.accounts.stalls(order.rid)
        if stalls is not None:
            self._ports.report(stalls, b"")
        self.accounts.forget(order.rid)

    def _plan(self, order: Pull) -> Plan:
        """What is to be read, by what permit, and the checksums it is to have."""
        if order.purpose == Purpose.REPLICA:
            permit, sums = self.attached.take(order.peer, order.rid, order.source)
        else:
            held = self._held[order.rid]
            permit, sums = held.permit, list(held.checksums[order.first : order.first + len(order.source)])
        source, target = np.array(order.source, np.int32), np.array(order.target, np.int32)
        return Plan(source, target, np.array(sums, np.uint64), permit=permit)

    def _note_cached(self, run: Run) -> None:
        """A sequence that starts behind its first token does so because its prefix was found."""
        for piece in run.slices:
            if piece.admit:
                held = self._held[piece.rid]
                if not held.started:
                    held.cached = min(piece.start, held.num_prompt) if held.computes else 0
                    held.note_resumed(piece.start, self.resumed)
                else:
                    log.info("preempted: its memory went to an older request", extra=about(held.name, piece.rid))
                    if piece.rid not in self.accounts:
                        self.accounts.note(piece.rid, len(held.tokens) - held.num_prompt, "preempted")
                held.started = True

    def _emitted(self, held: Held, order: Emit) -> bytes:
        """The attachment of an Emit: token ids, and what else is known of them."""
        start = held.num_prompt + order.first
        places = range(start, start + order.count)
        ids = held.tokens[start : start + order.count].tobytes()
        scores = tuple(held.scores.pop(place) for place in places if place in held.scores)
        again, held.again = held.again, None
        if order.first > 0:
            return pack_emit(ids, Extra(0, scores, again=again))
        return pack_emit(ids, Extra(held.cached, scores, tuple(held.prompt_scores)))

    def _tell(self, order: ToPeer, attachment: bytes) -> None:
        """Send a peer what is for it; it hears our name in place of its own."""
        self._ports.tell(order.peer, replace(order, peer=self.policy.spec.name), attachment)

    def _placed(self, place: Place, attachment: bytes) -> Place:
        """Take in an attempt; returns it with the hashes of the blocks that earlier attempts filled."""
        ticket = unpack_ticket(attachment)
        tokens = array("i")
        tokens.frombytes(ticket.tokens)
        size = self.policy.spec.block_size
        parent = place.hashes[-1] if place.hashes else ticket.root
        # Where none came no prefix is to be found, so that its log-probabilities are computed: with the first attempt.
        if len(place.hashes) >= place.num_prompt // size or place.num_tokens > place.num_prompt:
            written = block_hashes(tokens[len(place.hashes) * size :], size, parent)
            parent = written[-1] if written else parent
            place = replace(place, hashes=place.hashes + written)
        computes = place.part != Role.DECODE
        expects, known = "" if computes else place.peer, len(tokens)
        self._held[place.rid] = Held(
            tokens, ticket.num_prompt, len(place.hashes), parent, expects, array("Q"), computes, known, name=ticket.name
        )
        log.debug("placed", extra=about(ticket.name, place.rid, part=str(place.part), peer=place.peer))
        self._ports.admit(place.rid, tokens.tolist(), ticket.num_prompt, ticket.sampling)
        for publish, early in self.attached.claim(place.rid):
            self._published(publish, early)
        return place

    def _published(self, event: Publish, attachment: bytes) -> None:
        held = self._held.get(event.rid)
        if held is None:
            self.attached.published(event, attachment)
        elif held.expects == event.peer:  # what came before the Place may be anybody's
            held.expects = "" if event.final else held.expects
            self._attach(event, attachment)

    def _describe(self, order: Publish) -> bytes:
        """The attachment of a Publish: what lets its blocks be read, then (final) the first token."""
        first = pack_ids([self._held[order.rid].tokens[-1]]) if order.final else b""
        return self._offered(order) + first

    def _offered(self, order: Publish | Replicate) -> bytes:
        """What lets blocks of ours be read: a permit, and their checksums."""
        sums = self._ports.checksum(np.array(order.blocks, np.int32)).tobytes() if order.blocks else b""
        return self.permits.issue(order.rid) + sums

    def _attach(self, event: Publish, data: bytes) -> None:
        held = self._held[event.rid]
        held.permit, sums, first = unpack_published(data, len(event.blocks))
        held.checksums.extend(sums)
        if first:
            if (coming := self.accounts.arriving(event.rid)) is not None:
                coming.final(self._clock())
            held.tokens.extend(first)
            self._ports.extend(event.rid, first)

    def _filled(self, run: Run) -> tuple[tuple[int, bytes], ...]:
        """Hashes of the blocks that became full of computed tokens and that policy does not know yet."""
        size, held = self.policy.spec.block_size, self._held
        pieces = (piece for piece in run.slices if piece.rid in held)
        return tuple((p.rid, digest) for p in pieces for digest in held[p.rid].fill(p.start + p.count, size))

    def computing_s(self) -> float:
        """For how long the executor has been at its present step; 0 where there is none."""
        return 0.0 if self._computing is None else self._clock() - self._computing

    def state(self) -> dict[str, Any]:
        """What `/workers` shows of this worker."""
        policy = self.policy
        computed = None if self._last_step is None else round(self._clock() - self._last_step, 3)
        lost = self._journal.num_lost if self._journal is not None else 0
        return shown(policy) | {
            "resumed": self.resumed,
            "steps": self.num_steps,
            "last_step_s": computed,
            "journal_lost": lost,
            "kv": self.traffic.state() | {"moved": self.accounts.totals()},
        }


def forget_peer(driver: WorkerDriver, peer: str) -> None:
    """It is gone, or out of reach: nothing is kept under its name."""
    driver.traffic.links.pop(peer, None)
    driver.accounts.forget_peer(peer)
    driver.attached.forget_peer(peer)


def shown(policy: Worker) -> dict[str, Any]:
    """The part of it that policy knows."""
    return {
        "role": str(policy.spec.role),
        "running": len(policy.running),
        "waiting": len(policy.claims),
        "requests": len(policy.seqs),
        "idle": policy.idle_reason(),
        "preempted": policy.num_preempted,
        "kept": len(policy.keep),
        "blocks": policy.pool.counts(),
        "balanced": policy.pool.balanced(),
        "leases": {
            "offered": policy.source.num_open,
            "expected": policy.sink.num_expected,
            "kept": len(policy.keep),
        },
    }
