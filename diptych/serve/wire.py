"""What the processes of a cluster say to each other beside the policy's own messages, and the codec for all of it.

Attachments carry what policy must not see: a `Ticket` goes with every `Place`, token ids (and an `Extra`, where there
is something to say) with `Emit`, `Finish` and `Deliver`, a permit and checksums with `Replicate` and `Publish` (the
last with the first token). Not responsible for sockets (`channel.py`).
"""

import hmac
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

from diptych import journal
from diptych.engine.executor import Sampling, Score
from diptych.errors import ProtocolError
from diptych.serve.account import Prefilled, Received, Stalled
from diptych.transfer.seam import PERMIT_BYTES


@dataclass(frozen=True, slots=True)
class Challenge:
    """First word on every connection, from the side that was called: a number nobody has used before."""

    nonce: bytes


@dataclass(frozen=True, slots=True)
class Hello:
    """Who is calling, a nonce of its own, and the proof that it knows the cluster's key, which itself never travels."""

    kind: str  # "worker", "join", "api" or "peer"
    name: str
    incarnation: int
    nonce: bytes = b""
    proof: bytes = b""


@dataclass(frozen=True, slots=True)
class Welcome:
    """The answer to a Hello that was accepted: who was called, and the proof that it knows the key, too."""

    name: str
    proof: bytes = b""


@dataclass(frozen=True, slots=True)
class Terms:
    """The router to whoever would join: what all workers must have in common, and how they are set up here.

    The attachment is the JSON of a `Cluster`.
    """

    facts: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Refuse:
    """The router to a worker that cannot be part of this cluster: what would have to change."""

    why: str


@dataclass(frozen=True, slots=True)
class Register:
    """A worker tells the router, and its peers, what it is.

    `address` is where peers call it; `transport` describes how its blocks are read. `facts` are what all workers of a
    cluster must have in common.
    """

    worker: str
    incarnation: int
    pid: int
    role: str
    num_blocks: int
    block_size: int
    address: str
    transport: bytes
    token_bytes: int = 0  # KV of one token
    facts: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Meet:
    """The router to a new worker: connect to these, then say Ready."""

    peers: tuple[tuple[str, str], ...]  # (worker, address)


@dataclass(frozen=True, slots=True)
class Ready:
    """To the router: I am connected to every peer I was told of. To a peer: I can read your blocks."""

    worker: str


@dataclass(frozen=True, slots=True)
class Gone:
    """The router to all workers: that one has left for good; call it no more."""

    worker: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class Submit:
    """An API process hands a request in. The attachment is its Ticket."""

    request: int
    num_prompt: int
    max_new: int
    priority: int
    hashes: tuple[bytes, ...]  # of the full prompt blocks
    ident: str = ""  # what its client knows it by (`frontend.Label`)
    caller: str = ""
    index: int = 0


class Deliver(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=74):
    """The router to an API process: `count` further tokens of an answer (the attachment), or its end.

    `reason` "" means that it goes on. `status` 0 means no error; otherwise an HTTP status and why.
    """

    request: journal.Number
    reason: str = ""
    status: journal.Number = 0
    why: str = ""
    count: journal.Number = 0


@dataclass(frozen=True, slots=True)
class Note:
    """An API process, when a client has its answer: how it looked from there. `ttft_s` 0: no token came.

    Seconds: `api_s` from the request's arrival until it was ready to be submitted, `leader_s` that it then waited for a
    sibling with the same prompt, `out_s` from the first token's arrival to its text.
    """

    ident: str
    index: int
    finish: str
    ttft_s: float
    api_s: float
    leader_s: float
    out_s: float


@dataclass(frozen=True, slots=True)
class Ask:
    """How are you? Answered by a Report with the same number; `metrics`: with what the router counts."""

    number: int
    metrics: bool = False


@dataclass(frozen=True, slots=True)
class Look:
    """What became of the requests known by that name, or ("") of the last `limit`? Answered by a Report."""

    number: int
    name: str
    limit: int


@dataclass(frozen=True, slots=True)
class Report:
    """The state of a worker, or of all of them (the attachment: JSON)."""

    number: int


@dataclass(frozen=True, slots=True)
class Retire:
    """An API process: take a worker out of service. Answered by a Report; its attachment has an HTTP status and why."""

    number: int
    worker: str
    timeout_s: float
    force: bool


@dataclass(frozen=True, slots=True)
class Pulse:
    """A worker's event loop turns; its present step has been computed for so long (0: there is none)."""

    computing_s: float


@dataclass(frozen=True, slots=True)
class Bye:
    """A worker that was told to stop is about to hang up."""


_OWN_TYPES = (
    Challenge, Hello, Welcome, Terms, Refuse, Register, Meet, Ready, Gone, Submit, Deliver, Ask, Report, Retire, Bye,
    Pulse,
    Note, Look, Prefilled, Received, Stalled,
)  # fmt: skip
CODEC = journal.POLICY.including(journal.Codec(_OWN_TYPES, first_code=64))


NONCE_BYTES = 32
_ENCODER = msgspec.msgpack.Encoder()


def caller_proof(key: str, challenge: bytes, hello: Hello) -> bytes:
    """What only a caller that knows the key can say to this challenge, for this hello (HMAC-SHA256, RFC 2104)."""
    return _proof(key, "caller", challenge, hello, "")


def called_proof(key: str, challenge: bytes, hello: Hello, name: str) -> bytes:
    """What only a called side of that name that knows the key can answer to this hello."""
    return _proof(key, "called", challenge, hello, name)


def _proof(key: str, side: str, challenge: bytes, hello: Hello, name: str) -> bytes:
    said = (side, challenge, hello.nonce, hello.kind, hello.name, hello.incarnation, name)
    return hmac.digest(key.encode(), _ENCODER.encode(said), "sha256")


class Ticket(msgspec.Struct, frozen=True, array_like=True):
    """What a worker needs of a request and policy must not know: token ids (int32) and how to sample.

    The first `num_prompt` tokens are the prompt; any further ones were written by an earlier attempt. `root` is the
    parent of the first block's hash. `name` is what log lines call the request: the router fills it in.
    """

    tokens: bytes
    num_prompt: int
    sampling: Sampling
    root: bytes
    name: str = ""


class Extra(msgspec.Struct, frozen=True, array_like=True):
    """What is known of emitted tokens beside their ids. What is not there was not asked for.

    With the first token of an answer: how many `cached` prompt tokens the worker found, and `prompt`, the scores of
    the prompt from its second token on. With the end of a request that writes nothing: `cached`, and its `vector`.
    With the first tokens of an attempt that goes on where another was lost, `again`: how many tokens of the prompt, and
    of what was written, were computed once more.
    """

    cached: int = 0
    scores: tuple[Score, ...] = ()  # one for each token
    prompt: tuple[Score, ...] = ()
    vector: bytes = b""  # float32
    again: tuple[int, int] | None = None


Count = Annotated[float, msgspec.Meta(ge=0)]
Name = Annotated[str, msgspec.Meta(max_length=64)]


class Moved(msgspec.Struct):
    """What was read from one peer, in all."""

    source: Name
    lane: Name
    purpose: Name
    bytes: Count
    reads: Count


class KvState(msgspec.Struct):
    """What was read here, in all."""

    bytes: Count = 0
    seconds: Count = 0
    transfers: Count = 0
    failed: Count = 0
    moved: tuple[Moved, ...] = ()


class State(msgspec.Struct):
    """What others count on in a worker's Report (JSON); it may say more."""

    running: int = 0
    waiting: int = 0
    requests: int = 0
    last_step_s: float | None = None
    blocks: dict[str, int] = {}
    kv: KvState = msgspec.field(default_factory=KvState)


MAX_STATE_BYTES = 1 << 16
NO_EXTRA = Extra()

_STATE = msgspec.json.Decoder(State)
_EXTRA = msgspec.msgpack.Decoder(Extra)
_TICKET = msgspec.msgpack.Decoder(Ticket)


def pack(value: Ticket) -> bytes:
    """The bytes of an attachment."""
    return _ENCODER.encode(value)


def unpack_ticket(data: bytes) -> Ticket:
    """A Ticket; ProtocolError for anything else."""
    try:
        ticket = _TICKET.decode(data)
    except journal.MALFORMED as error:
        raise ProtocolError(f"malformed ticket: {error}") from None
    if len(ticket.tokens) % 4 or not 1 <= ticket.num_prompt <= len(ticket.tokens) // 4:
        raise ProtocolError("a ticket's token ids are not whole int32 numbers, or fewer than its prompt has")
    return ticket


def state_of(data: bytes) -> dict[str, Any]:
    """What a worker reports of itself; ProtocolError where it is not that."""
    if len(data) > MAX_STATE_BYTES:
        raise ProtocolError(f"a report of {len(data)} bytes")
    try:
        _STATE.decode(data)
        return msgspec.json.decode(data, type=dict[str, Any])
    except journal.MALFORMED as error:
        raise ProtocolError(f"malformed report: {error}") from None


def pack_ids(ids: list[int]) -> bytes:
    """Token ids as int32."""
    return array("i", ids).tobytes()


def pack_emit(ids: bytes, extra: Extra) -> bytes:
    """The attachment of an Emit or a Finish: token ids as int32, then the Extra, unless it says nothing."""
    return ids if extra == NO_EXTRA else ids + _ENCODER.encode(extra)


def unpack_emit(count: int, data: bytes) -> tuple[list[int], Extra]:
    """The `count` token ids and the Extra of an attachment; ProtocolError where it is not one."""
    if len(data) == 4 * count:
        return unpack_ids(data), NO_EXTRA
    ids = unpack_ids(data[: 4 * count])
    if len(ids) != count:
        raise ProtocolError(f"{count} token ids are announced, {len(ids)} are there")
    try:
        extra = _EXTRA.decode(data[4 * count :])
    except journal.MALFORMED as error:
        raise ProtocolError(f"malformed extra: {error}") from None
    if extra.cached < 0 or len(extra.vector) % 4 or not all(map(_is_score, (*extra.scores, *extra.prompt))):
        raise ProtocolError("an extra whose numbers do not fit together")
    if extra.scores and len(extra.scores) != count:
        raise ProtocolError(f"{len(extra.scores)} scores for {count} tokens")
    return ids, extra


def _is_score(score: Score) -> bool:
    """One number for each id, and an id at least."""
    return len(score.ids) == len(score.values) and len(score.ids) > 0 and len(score.ids) % 4 == 0


def unpack_ids(data: bytes) -> list[int]:
    """Token ids from int32; ProtocolError where the bytes are not whole numbers."""
    if len(data) % 4:
        raise ProtocolError("token ids are not whole int32 numbers")
    return memoryview(data).cast("i").tolist()


def check_ids(ids: Iterable[int], vocab_size: int) -> None:
    """Raise ProtocolError where a token is none of the model's: an engine would read beyond its tables."""
    for token in ids:
        if not 0 <= token < vocab_size:
            raise ProtocolError(f"token {token} is none of the {vocab_size} there are")


def unpack_offered(data: bytes, count: int) -> tuple[bytes, list[int]]:
    """The permit for `count` blocks and their checksums (uint64); ProtocolError where the bytes are not that."""
    if len(data) != PERMIT_BYTES + 8 * count:
        raise ProtocolError(f"a permit and {count} checksums are announced, {len(data)} bytes are there")
    sums = array("Q")
    sums.frombytes(data[PERMIT_BYTES:])
    return data[:PERMIT_BYTES], sums.tolist()


def unpack_published(data: bytes, count: int) -> tuple[bytes, list[int], list[int]]:
    """The same, and the token ids behind it."""
    end = PERMIT_BYTES + 8 * count
    return *unpack_offered(data[:end], count), unpack_ids(data[end:])
