"""The live driver of `policy/router.py`: hands it events, and does what it orders through two ports.

Keeps what policy must not see: prompts, sampling parameters and every token written so far, so that a request whose
worker is lost goes on elsewhere where it stopped. The same class runs in the router process (`router_process.py`) and
in one process (`local.py`). Not responsible for any decision, for HTTP or for sockets.
"""

import logging
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from diptych.engine.executor import Sampling
from diptych.errors import ProtocolError
from diptych.journal import Journal
from diptych.policy.membership import Dismiss, Drain, Drained, LinkDown, LinkMeasured, LinkUp
from diptych.policy.messages import (
    MAX_ATTEMPTS,
    WELL,
    Cancel,
    Cancelled,
    Emit,
    Failed,
    Finish,
    Place,
    Progress,
    Reason,
    Reject,
    Role,
    RouterEvent,
    RouterOrder,
    Submitted,
    Tick,
    WorkerLost,
    WorkerUp,
    request_of,
)
from diptych.policy.router import Router
from diptych.policy.sequencer import Sequencer
from diptych.serve.frontend import NO_LABEL, Label
from diptych.serve.logs import about
from diptych.serve.records import Record, Records
from diptych.serve.wire import Deliver, Ticket, check_ids, pack, unpack_emit, unpack_ids

log = logging.getLogger(__name__)

# The last two are not heard of a present attempt, unless a worker or its peer is broken.
_GAVE_UP = (Reason.PEER_LOST, Reason.REFUSED, Reason.WORKER_LOST, Reason.CANCELLED, Reason.SUPERSEDED)
_BY_HALVES = (Reason.HANDED_OVER, Reason.EXPIRED)


class Ports(Protocol):
    """What the router's driver asks of the world around it. No call waits."""

    def send(self, worker: str, order: Place | Cancel | Drain, attachment: bytes) -> None:
        """Send to a worker."""

    def dismiss(self, worker: str) -> None:
        """Tell a worker to go and hang up on it; `RouterDriver.worker_lost` is to be called."""

    def deliver(self, client: Any, message: Deliver, attachment: bytes) -> None:
        """Send tokens, or the end of an answer, to whoever submitted the request."""


@dataclass(slots=True)
class Open:
    """A request in flight: whose it is, its tokens, and its present attempt."""

    client: Any
    tokens: "array[int]"  # prompt, then what was written
    num_prompt: int
    max_new: int
    sampling: Sampling
    root: bytes
    record: Record
    rid: int = -1
    holders: tuple[str, ...] = ()  # the workers that the present attempt was given to, in that order
    placed: float = 0.0  # when that was
    began: bool = False  # the present attempt has written a token
    keeper: str = ""  # who computes its prompt for another, and then keeps it; "" once that one is lost
    holds: bool = False  # that one is through with it
    kept: bool = False  # that was so when the present attempt was placed
    sequencer: Sequencer[tuple[str, bytes]] = field(default_factory=lambda: Sequencer(0))

    @property
    def num_written(self) -> int:
        """Tokens of the answer that the client was sent."""
        return len(self.tokens) - self.num_prompt


@dataclass(slots=True)
class Resumed:
    """What attempts that went on elsewhere had to compute again, in tokens."""

    requests: int = 0
    prompt_tokens: int = 0
    written_tokens: int = 0
    most_written: int = 0  # of one attempt

    def add(self, prompt: int, written: int) -> None:
        """Count one."""
        self.requests += 1
        self.prompt_tokens += prompt
        self.written_tokens += written
        self.most_written = max(self.most_written, written)


class RouterDriver:
    """Drives one policy object. All calls come from one thread."""

    def __init__(
        self,
        policy: Router,
        ports: Ports,
        clock: Callable[[], float],
        journal: Journal | None,
        vocab_size: int = 1 << 31,
        records: Records | None = None,
    ):
        self.policy = policy
        self._vocab_size = vocab_size
        self.records = records or Records()
        self.last_token = clock()  # when something last moved
        self.num_broken = 0  # streams that a worker tried to continue at the wrong place; must stay 0
        self.resumed = {"kept": Resumed(), "not kept": Resumed()}  # was its KV kept by somebody?
        self._ports = ports
        self._clock = clock
        self._journal = journal
        self._open: dict[int, Open] = {}
        self.moved: dict[tuple[str, ...], float] = {}  # when a token last came from these, by whom attempts are held

    @property
    def num_open(self) -> int:
        """Requests in flight."""
        return len(self._open)

    @property
    def open(self) -> Iterable[Open]:
        """Requests in flight, oldest first."""
        return self._open.values()

    def submit(self, client: Any, event: Submitted, ticket: Ticket, label: Label = NO_LABEL) -> None:
        """A client hands a request in. Its number must be new."""
        now = self._clock()
        if not self._open:
            self.last_token = now
        record = self.records.open(now, event.request, label, event.num_prompt, event.max_new)
        tokens = array("i")
        tokens.frombytes(ticket.tokens)
        self._open[event.request] = Open(
            client, tokens, ticket.num_prompt, event.max_new, ticket.sampling, ticket.root, record
        )
        self._decide(event)

    def cancel(self, request: int) -> None:
        """The client does not want it any more; nothing further is delivered."""
        open_ = self._open.pop(request, None)
        if open_ is not None:
            open_.record.end(self._clock(), "cancelled")
            self._decide(Cancelled(request))

    def drop_client(self, client: Any) -> None:
        """A client is gone: cancel all it has open."""
        for request in [number for number, open_ in self._open.items() if open_.client is client]:
            self.cancel(request)

    def worker_up(self, event: WorkerUp) -> None:
        """A worker is ready for work."""
        self._decide(event)

    def worker_lost(self, worker: str) -> None:
        """A worker is gone."""
        for holders in [holders for holders in self.moved if worker in holders]:
            del self.moved[holders]
        emitted = tuple((open_.rid, open_.num_written) for open_ in self._open.values() if open_.rid >= 0)
        for open_ in self._open.values():
            if open_.keeper == worker:
                open_.keeper, open_.holds = "", False
        self._decide(WorkerLost(worker, emitted))

    def told(self, event: LinkDown | LinkUp | LinkMeasured | Drain | Drained | Tick) -> None:
        """Who may work with whom has changed, or the time asked for has come."""
        self._decide(event)

    def heard(self, worker: str, message: Emit | Finish, ids: bytes) -> None:
        """A worker speaks of an attempt; of attempts that are not the present one nothing is believed any more.

        Raises ProtocolError, with nothing changed, where it says what no worker can have to say.
        """
        request = request_of(message.rid)
        open_ = self._open.get(request)
        if open_ is None or open_.rid != message.rid:
            # Cancelled here already, or an old attempt; policy keeps its own books of Finish.
            return
        self._check(worker, open_, message, ids)
        try:
            ready = open_.sequencer.take(message, (worker, ids))
        except ValueError as error:
            log.error("worker %s: %s", worker, error, extra=about(open_.record.name, message.rid))
            self._break(worker, open_, message.rid)
            return
        for said, (speaker, tokens) in ready:
            if self._open.get(request) is not open_ or open_.rid != said.rid:
                return
            if isinstance(said, Emit):
                self._emitted(speaker, request, open_, said, tokens)
            else:
                self._finished(speaker, request, open_, said, tokens)

    def _check(self, worker: str, open_: Open, message: Emit | Finish, ids: bytes) -> None:
        """Is it said by who was given the attempt, and possible? Tokens are the next worker's input."""
        if worker not in open_.holders:
            raise ProtocolError(f"attempt {message.rid} is not {worker}'s")
        if isinstance(message, Emit):
            if message.count < 1 or message.first + message.count > open_.max_new:
                raise ProtocolError(f"tokens {message.first} and {message.count} more of an answer of {open_.max_new}")
            check_ids(unpack_ids(ids[: 4 * message.count]), self._vocab_size)
            if message.rid % MAX_ATTEMPTS and len(ids) > 4 * message.count:
                unpack_emit(message.count, ids)  # we read it ourselves, and perhaps later
        elif message.worker != worker or not _ends(message.reason, open_):
            raise ProtocolError(f"{worker} says that {message.worker} ended with {message.reason}")

    def _emitted(self, worker: str, request: int, open_: Open, message: Emit, attachment: bytes) -> None:
        num_bytes = 4 * message.count  # what comes after the ids is for the client alone
        if len(attachment) < num_bytes:
            self._break(worker, open_, message.rid)
            return
        now = self.last_token = self.moved[open_.holders] = self._clock()
        open_.tokens.frombytes(attachment[:num_bytes])
        self.records.wrote(now, open_.record, message.count)
        self._ports.deliver(open_.client, Deliver(request, count=message.count), attachment)
        if message.rid % MAX_ATTEMPTS and len(attachment) > num_bytes:
            self._note_resumed(open_, message.count, attachment)
        if not open_.began:
            open_.began = True
            open_.holds = bool(open_.keeper)
            self._decide(Progress(message.rid))

    def _note_resumed(self, open_: Open, count: int, attachment: bytes) -> None:
        again = unpack_emit(count, attachment)[1].again
        if again is not None:
            self.resumed["kept" if open_.kept else "not kept"].add(*again)

    def _break(self, worker: str, open_: Open, rid: int) -> None:
        """A worker said something that cannot be: the attempt is given up."""
        self.num_broken += 1
        self._decide(Failed(rid, worker, open_.num_written, Reason.REFUSED))

    def _finished(self, worker: str, request: int, open_: Open, message: Finish, attachment: bytes) -> None:
        if message.reason in _GAVE_UP:
            self._decide(Failed(message.rid, worker, open_.num_written, message.reason))
            return
        if message.reason in WELL:
            del self._open[request]
            now = self.last_token = self._clock()
            open_.record.end(now, str(message.reason))
            self._ports.deliver(open_.client, Deliver(request, str(message.reason)), attachment)
        self._decide(message)

    def _decide(self, event: RouterEvent) -> None:
        now = self._clock()
        orders = self.policy.on(now, event)
        if self._journal is not None:
            self._journal.record(now, event, orders)
        for order in orders:
            self._do(order, event)

    def _do(self, order: RouterOrder, event: RouterEvent) -> None:
        match order:
            case Place():
                open_ = self._open[request_of(order.rid)]
                _log_place(open_, order, event)
                open_.placed = self._clock()
                self.records.placed(open_.placed, open_.record, order, _reason(event))
                others = open_.holders if open_.rid == order.rid else ()
                open_.rid, open_.holders = order.rid, (*others, order.worker)
                open_.began, open_.sequencer = False, Sequencer(open_.num_written)
                if order.part != Role.DECODE:
                    open_.kept = open_.holds
                    keeper = order.worker if order.peer else ""
                    open_.keeper, open_.holds = keeper, open_.holds and keeper == open_.keeper
                ticket = Ticket(open_.tokens.tobytes(), open_.num_prompt, open_.sampling, open_.root, open_.record.name)
                self._ports.send(order.worker, order, pack(ticket))
            case Cancel() | Drain():
                self._ports.send(order.worker, order, b"")
            case Dismiss(worker=worker):
                self._ports.dismiss(worker)
            case Reject(request=request, status=status, why=why):
                open_ = self._open.pop(request)
                open_.record.end(self._clock(), "failed" if open_.record.attempts else "rejected", why)
                level = logging.WARNING if open_.record.attempts else logging.INFO
                log.log(level, "a request ends: %s", why, extra=about(open_.record.name, open_.rid, status=status))
                self._ports.deliver(open_.client, Deliver(request, "", status, why), b"")


def _log_place(open_: Open, order: Place, event: RouterEvent) -> None:
    """Who gets it; that it goes on elsewhere is said at once for the two halves of a pair."""
    facts = about(open_.record.name, order.rid, worker=order.worker, part=str(order.part), token=open_.num_written)
    log.debug("placed", extra=facts)
    if open_.record.attempts and open_.rid != order.rid:
        log.info("a request goes on elsewhere: %s", _reason(event), extra=facts)


def _ends(reason: Reason, open_: Open) -> bool:
    """An answer can end for that reason: one that is written by its tokens, one that is not by its prompt."""
    if reason in WELL:
        return (reason == Reason.COMPUTED) == (open_.max_new == 0)
    return reason not in _BY_HALVES or len(open_.holders) > 1


def _reason(event: RouterEvent) -> str:
    """Why an attempt is followed by another one."""
    return str(event.reason) if isinstance(event, Failed) else str(Reason.WORKER_LOST)
