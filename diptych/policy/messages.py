"""The two vocabularies of the policy objects: what the router says and hears, and what a worker says and hears.

What one object orders is an event for the next, so most classes here are both: the router's `Place` is
a worker's event, a worker's `Publish` is its peer's event, its `Finish` is the router's. Adding a class
is a design decision; `docs/architecture.md` has the table of who says what to whom.

These are facts: frozen, slotted, made of ints, floats, strings, bytes and tuples only, so that one codec
(`diptych.journal`) serves the wire and the record. Token ids, sampling parameters and checksums never appear
here: drivers carry them beside a message. Nor does the true output length: a policy cannot cheat.

`rid` is a request id as the workers see it: `request * MAX_ATTEMPTS + attempt`. Every placement of a request has
a fresh `rid`, so whatever an earlier attempt still says is recognised as stale.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from diptych.policy.membership import Dismiss, Drain, Drained, LinkDown, LinkMeasured, LinkUp
from diptych.policy.retention import Release, Replicate, Replicated

MAX_ATTEMPTS = 64


def attempt_id(request: int, attempt: int) -> int:
    """The `rid` of one attempt at a request."""
    return request * MAX_ATTEMPTS + attempt


def request_of(rid: int) -> int:
    """The request an attempt belongs to."""
    return rid // MAX_ATTEMPTS


class Role(StrEnum):
    """What a worker does; also which part of one request it was given."""

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"


class Reason(StrEnum):
    """Why a request left a worker or the system."""

    STOP = "stop"  # a stop token, or the model's end of sequence
    LENGTH = "length"  # max_new tokens were written
    COMPUTED = "computed"  # nothing was to be written, and the prompt is computed
    CANCELLED = "cancelled"
    HANDED_OVER = "handed_over"  # prefill side: the decode side has everything
    EXPIRED = "expired"  # prefill side: nobody came for the KV within its lease
    SUPERSEDED = "superseded"  # a later attempt at the same request came to the same worker
    PEER_LOST = "peer_lost"  # the other half of the pair is gone and this half cannot go on alone
    WORKER_LOST = "worker_lost"
    REFUSED = "refused"  # the worker cannot hold it


WELL = (Reason.STOP, Reason.LENGTH, Reason.COMPUTED)
"""How a request ends when nothing went wrong: its client has all there is."""


# --- outside world -> router -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Submitted:
    """A request arrives: lengths in tokens, and the chained hashes of its full prompt blocks.

    `max_new` 0 is a request that writes nothing: its prompt is computed, and what comes of it is the driver's.
    """

    request: int
    num_prompt: int
    max_new: int
    hashes: tuple[bytes, ...] = ()
    priority: int = 0  # lower goes first


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The client is gone, or asked to stop."""

    request: int


@dataclass(frozen=True, slots=True)
class WorkerUp:
    """A worker is connected to every peer and ready for work. Capacities in blocks of `block_size` tokens.

    `token_bytes` is the KV of one token; 0 where nobody said.
    """

    worker: str
    incarnation: int
    role: Role
    num_blocks: int
    block_size: int
    token_bytes: int = 0


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """A worker's process is gone. `emitted`: for each request that was on it, tokens the client already has."""

    worker: str
    emitted: tuple[tuple[int, int], ...] = ()  # (rid, number of tokens)


@dataclass(frozen=True, slots=True)
class Progress:
    """The first token of an attempt was written: its prefill is over."""

    rid: int


@dataclass(frozen=True, slots=True)
class Failed:
    """A worker gave an attempt up; it may be placed again. `num_emitted`: tokens the client already has."""

    rid: int
    worker: str
    num_emitted: int
    reason: Reason


# --- router -> worker ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Place:
    """Do `part` of a request. `order` is its age: everyone serves lower (priority, order) first.

    `num_tokens` counts the tokens known so far: the prompt, and what an earlier attempt had written.
    `num_prompt + max_new` is the length at which it ends at the latest. A request that writes nothing has a prefill
    part and no peer, whatever the worker's role.
    """

    worker: str
    rid: int
    part: Role
    peer: str  # the other half of a pair; "" where there is none
    num_prompt: int
    num_tokens: int
    max_new: int
    hashes: tuple[bytes, ...]
    priority: int
    order: int


@dataclass(frozen=True, slots=True)
class Cancel:
    """Stop an attempt and give back whatever it holds."""

    worker: str
    rid: int


@dataclass(frozen=True, slots=True)
class Reject:
    """The router's last word on a request that never ran, or cannot go on. `status` is an HTTP status."""

    request: int
    status: int
    why: str


# --- worker <-> its executor -----------------------------------------------------------------------------------


class Slice(NamedTuple):
    """`count` new tokens of one sequence in a step, at positions `start .. start + count`.

    `blocks` are appended to the sequence's block table (a delta, however long the context); with `admit` the
    table starts anew. `sample`: the last of these tokens is the last one known, so the step yields the next (or, where
    nothing is to be written, the result).
    """

    rid: int
    start: int
    count: int  # type: ignore[assignment]  # shadows tuple.count, which nobody wants of a slice
    blocks: tuple[int, ...] = ()
    sample: bool = False
    admit: bool = False


@dataclass(frozen=True, slots=True)
class Run:
    """Compute one step. A driver in virtual time may repeat it up to `Worker.horizon()` times, each a token further."""

    step: int
    slices: tuple[Slice, ...]


@dataclass(frozen=True, slots=True)
class StepDone:
    """`count` repetitions of a step are done, the last of them just now.

    `finished`: sequences whose last sampled token ended them. `filled`: (rid, hash) of blocks of generated tokens
    that became full, oldest first.
    """

    step: int
    elapsed_s: float
    count: int = 1
    finished: tuple[int, ...] = ()
    filled: tuple[tuple[int, bytes], ...] = ()


# --- worker <-> peer: the handover -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Offer:
    """Prefill side: I hold (or am computing) the KV of `num_tokens` tokens and keep it until you are done."""

    peer: str
    rid: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Publish:
    """Prefill side: these further blocks are written and may be read (the wire's `ready`).

    `num_tokens` are covered in all. `final`: that is everything, and the first token was sampled. The driver adds
    the blocks' checksums, and the first token where `final`.
    """

    peer: str
    rid: int
    blocks: tuple[int, ...]
    num_tokens: int
    final: bool


@dataclass(frozen=True, slots=True)
class Done:
    """Decode side: I have read and verified everything. Answered by `Answer`."""

    peer: str
    rid: int


@dataclass(frozen=True, slots=True)
class Answer:
    """Prefill side, to `Done`: ok, or the lease had ended and what was read must not be used."""

    peer: str
    rid: int
    ok: bool


@dataclass(frozen=True, slots=True)
class Revoke:
    """Prefill side: please stop reading and say so. Always answered by `Drop`."""

    peer: str
    rid: int


@dataclass(frozen=True, slots=True)
class Drop:
    """Decode side: I do not read this (any more). `kept`: I compute it myself, so keep it until `Release`.

    Prefill side: I want no more of what you let me replicate.
    """

    peer: str
    rid: int
    kept: bool = False


@dataclass(frozen=True, slots=True)
class Beat:
    """Decode side: I still want these; extend their leases."""

    peer: str
    rids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PeerLost:
    """The connection to a peer ended. Reads from it fail on their own; nobody reads from us over it any more."""

    peer: str


# --- worker <-> its transport ----------------------------------------------------------------------------------


class Purpose(StrEnum):
    """What a read is for."""

    HANDOVER = "handover"
    REPLICA = "replica"


@dataclass(frozen=True, slots=True)
class Pull:
    """Read the peer's `source` blocks into our `target` blocks (same length), and verify their checksums."""

    pull: int
    rid: int
    peer: str
    first: int  # index of source[0] among the blocks of the sequence
    source: tuple[int, ...]
    target: tuple[int, ...]
    purpose: Purpose = Purpose.HANDOVER


@dataclass(frozen=True, slots=True)
class CancelPull:
    """Please stop a read. Frees nothing: only `Settled` (or `Read`) does."""

    pull: int


@dataclass(frozen=True, slots=True)
class Read:
    """A read is complete and verified; no byte of it can land any more."""

    pull: int
    num_bytes: int
    elapsed_s: float


@dataclass(frozen=True, slots=True)
class ReadFailed:
    """A read did not succeed. Its blocks stay quarantined until `Settled`."""

    pull: int
    why: str


@dataclass(frozen=True, slots=True)
class Settled:
    """No byte of a cancelled or failed read can land any more."""

    pull: int


# --- worker -> router ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Emit:
    """`count` tokens of the answer, numbered from `first` (0 is the first the model wrote). The driver adds them."""

    rid: int
    first: int
    count: int


@dataclass(frozen=True, slots=True)
class Finish:
    """This worker computes and says nothing more for an attempt. `rungs`: seconds spent on each rung here.

    Blocks of it may stay fenced for a while (offered, quarantined) until their last reader or writer is done.
    """

    rid: int
    worker: str
    reason: Reason
    rungs: tuple[tuple[str, float], ...] = ()


# --- time ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tick:
    """The time an object asked for with `next_deadline()` has come."""


Retention = Replicate | Replicated | Release
Membership = LinkDown | LinkUp | LinkMeasured | Drain | Drained
RouterEvent = Submitted | Cancelled | WorkerUp | WorkerLost | Progress | Failed | Finish | Tick | Membership
RouterOrder = Place | Cancel | Reject | Drain | Dismiss
Handover = Offer | Publish | Done | Answer | Revoke | Drop | Beat
WorkerEvent = Place | Cancel | Drain | StepDone | Handover | Retention | PeerLost | Read | ReadFailed | Settled | Tick
WorkerOrder = Run | Handover | Retention | Pull | CancelPull | Emit | Finish | Drained | LinkMeasured
Message = RouterEvent | RouterOrder | WorkerEvent | WorkerOrder
