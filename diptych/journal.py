"""One codec for events and orders: what goes over the wire and what is kept of a run are the same bytes.

A message is a msgpack array `[code, field, field, ...]`; the code picks a typed decoder, so that what arrives is
checked against the dataclass it claims to be before anybody sees it: types, and that no number is negative or beyond
what arithmetic here is made for. Whether a message makes sense where it arrives is for the process that hears it. A
frame is a list of (message, attachment) pairs: the attachment is what policy must not see (token ids, checksums,
sampling parameters).

A journal is one file (in segments) per policy object and incarnation: a header with the object's spec, then for every
event the time, the event and the orders it led to. It is written by a thread through a bounded buffer; what did not fit
is counted, and says that the journal cannot be replayed. Not responsible for replaying (`sim/replay.py`).
"""

import struct
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import msgspec

from diptych.errors import ConfigError, ProtocolError
from diptych.policy import membership, messages, retention
from diptych.policy.batching import WorkerSpec
from diptych.policy.books import RouterSpec
from diptych.policy.messages import Message

MAX_FRAME_BYTES = 64 << 20
MAX_CODE = 0x7F
MALFORMED = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for bytes that are not what was expected, whoever wrote them."""
_LENGTHS = struct.Struct("<II")
_LENGTH = struct.Struct("<I")

_POLICY_TYPES: tuple[type, ...] = (
    messages.Submitted,
    messages.Cancelled,
    messages.WorkerUp,
    messages.WorkerLost,
    messages.Progress,
    messages.Failed,
    messages.Place,
    messages.Cancel,
    messages.Reject,
    messages.Run,
    messages.StepDone,
    messages.Offer,
    messages.Publish,
    messages.Done,
    messages.Answer,
    messages.Revoke,
    messages.Drop,
    messages.Beat,
    messages.PeerLost,
    messages.Pull,
    messages.CancelPull,
    messages.Read,
    messages.ReadFailed,
    messages.Settled,
    messages.Emit,
    messages.Finish,
    messages.Tick,
    retention.Replicate,
    retention.Replicated,
    retention.Release,
    membership.LinkDown,
    membership.LinkUp,
    membership.Drain,
    membership.Drained,
    membership.Dismiss,
    membership.LinkMeasured,
)
"""In the order of their codes: append only."""


Number = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]
_Rank = Annotated[int, msgspec.Meta(ge=-(1 << 31), lt=1 << 31)]
_Amount = Annotated[float, msgspec.Meta(ge=0)]  # which not-a-number is not


def _bounded(name: str, hint: Any) -> Any:
    """A field's type, its numbers within bounds: all are ids, counts and durations, but for priorities."""
    if hint is int:
        return _Rank if name == "priority" else Number
    if hint is float:
        return _Amount
    if get_origin(hint) is tuple:
        return tuple.__class_getitem__(tuple(_bounded("", each) for each in get_args(hint)))
    return hint


class Codec:
    """Messages to bytes and back, for a fixed list of dataclasses. `first_code` numbers the first of them.

    What is said for every token may be an array-like Struct instead, its code as its tag and its numbers within bounds:
    the bytes are the same, and msgspec reads and writes them by itself, which costs less.
    """

    def __init__(self, types: Iterable[type[Any]], first_code: int = 0):
        self._encoder = msgspec.msgpack.Encoder()
        self._code: dict[type, tuple[int, tuple[str, ...] | None]] = {}
        self._decode: dict[int, tuple[type, Any]] = {}
        for code, kind in enumerate(types, first_code):
            assert code <= MAX_CODE, "a code is one byte"
            if issubclass(kind, msgspec.Struct):
                assert kind.__struct_config__.tag == code, f"{kind.__name__} is number {code}"
                self._code[kind] = (code, None)
                self._decode[code] = (kind, msgspec.msgpack.Decoder(kind))
                continue
            names = tuple(field.name for field in fields(kind))
            hints = get_type_hints(kind)
            shape: Any = tuple.__class_getitem__((int, *(_bounded(name, hints[name]) for name in names)))
            self._code[kind] = (code, names)
            self._decode[code] = (kind, msgspec.msgpack.Decoder(shape))

    def including(self, other: "Codec") -> "Codec":
        """A codec for the messages of both."""
        both = Codec(())
        both._code = self._code | other._code
        both._decode = self._decode | other._decode
        return both

    def encode(self, message: Any) -> bytes:
        """The bytes of one message."""
        code, names = self._code[type(message)]
        if names is None:
            return self._encoder.encode(message)
        return self._encoder.encode((code, *[getattr(message, name) for name in names]))

    def decode(self, data: bytes) -> Any:
        """The message these bytes are; raises ProtocolError for anything else."""
        # The array's first element, read without decoding the rest: its header is one byte below 16 fields.
        known = self._decode.get(data[1]) if len(data) > 1 and data[0] & 0xF0 == 0x90 else None
        if known is None:
            raise ProtocolError(f"not a message: {data[:8].hex()}")
        kind, decoder = known
        try:
            found = decoder.decode(data)
        except MALFORMED as error:
            raise ProtocolError(f"malformed {kind.__name__}: {error}") from None
        return kind(*found[1:]) if type(found) is tuple else found


POLICY = Codec(_POLICY_TYPES)


def frame(entries: Iterable[tuple[bytes, bytes]]) -> bytes:
    """One frame for the wire: its length, then (message, attachment) pairs, each with both lengths."""
    parts = [b""]
    for message, attachment in entries:
        parts += (_LENGTHS.pack(len(message), len(attachment)), message, attachment)
    body = b"".join(parts)
    return _LENGTH.pack(len(body)) + body


def entries(body: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The pairs of a frame's body; raises ProtocolError if the lengths do not add up."""
    at, end = 0, len(body)
    while at < end:
        if at + 8 > end:
            raise ProtocolError("a frame ends inside a header")
        num_message, num_attachment = _LENGTHS.unpack_from(body, at)
        begin = at + 8
        middle = begin + num_message
        at = middle + num_attachment
        if at > end:
            raise ProtocolError("a frame ends inside a message")
        yield body[begin:middle], body[middle:at]


# --- the record ------------------------------------------------------------------------------------------------

MAGIC = b"diptych journal 1\n"
SEGMENT_BYTES = 64 << 20
BUFFER_BYTES = 32 << 20
SUFFIX = ".journal"
_NIL = b"\xc0"  # msgpack


class Header(msgspec.Struct, frozen=True):
    """What a journal is of. Exactly one of the two specs is set."""

    object: str
    incarnation: int
    segment: int
    router: RouterSpec | None = None
    worker: WorkerSpec | None = None


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """One event and what was ordered. `num_lost` above 0 says that so many events are missing here instead."""

    now: float
    event: msgspec.Raw
    orders: list[msgspec.Raw]
    num_lost: int = 0


class Journal:
    """Writes one object's journal into a folder. `record` only encodes and appends to a buffer."""

    def __init__(self, folder: Path, name: str, incarnation: int, spec: RouterSpec | WorkerSpec):
        folder.mkdir(parents=True, exist_ok=True)
        self.num_lost = 0
        self._folder = folder
        self._header = Header(
            name,
            incarnation,
            0,
            spec if isinstance(spec, RouterSpec) else None,
            spec if isinstance(spec, WorkerSpec) else None,
        )
        self._encoder = msgspec.msgpack.Encoder()
        self._buffer: deque[bytes] = deque()
        self._num_in = 0  # bytes put into the buffer, by whoever records
        self._num_out = 0  # bytes taken out, by the thread
        self._owed = 0  # events lost since the last one that was kept
        self._stop = threading.Event()
        self._file = self._open()
        self._thread = threading.Thread(target=self._write, name="journal", daemon=True)
        self._thread.start()

    def record(self, now: float, event: Message, orders: Iterable[Message]) -> None:
        """Keep one event and its orders."""
        if self._num_in - self._num_out > BUFFER_BYTES:
            self.num_lost += 1
            self._owed += 1
            return
        if self._owed:
            self._append(Entry(now, msgspec.Raw(_NIL), [], self._owed))
            self._owed = 0
        raw = [msgspec.Raw(POLICY.encode(order)) for order in orders]
        self._append(Entry(now, msgspec.Raw(POLICY.encode(event)), raw))

    def close(self) -> None:
        """Write what is buffered and stop."""
        if self._owed:
            self._append(Entry(0.0, msgspec.Raw(_NIL), [], self._owed))
        self._stop.set()
        self._thread.join()
        self._file.close()

    def _append(self, entry: Entry) -> None:
        data = self._encoder.encode(entry)
        self._buffer.append(_LENGTH.pack(len(data)) + data)
        self._num_in += len(data) + 4

    def _open(self) -> Any:
        name = f"{self._header.object}.{self._header.incarnation}.{self._header.segment}{SUFFIX}"
        file = (self._folder / name).open("wb")
        header = self._encoder.encode(self._header)
        file.write(MAGIC + _LENGTH.pack(len(header)) + header)
        file.flush()  # a process that is killed at once leaves a readable journal without events
        return file

    def _write(self) -> None:
        while True:
            stopping = self._stop.wait(0.2)
            data = b"".join([self._buffer.popleft() for _ in range(len(self._buffer))])
            self._num_out += len(data)
            if data:
                self._file.write(data)
                self._file.flush()
            if self._file.tell() > SEGMENT_BYTES:
                self._file.close()
                self._header = msgspec.structs.replace(self._header, segment=self._header.segment + 1)
                self._file = self._open()
            if stopping:
                return


@dataclass(frozen=True, slots=True)
class Recording:
    """A journal read back: all segments of one object's incarnation, in order."""

    header: Header
    segments: tuple[Path, ...]

    def __iter__(self) -> Iterator[tuple[float, Message, list[Message]]]:
        """(now, event, orders) in the order they happened; raises ConfigError where events are missing."""
        decoder = msgspec.msgpack.Decoder(Entry)
        for segment in self.segments:
            for data in _records(segment):
                try:
                    entry = decoder.decode(data)
                    if entry.num_lost:
                        raise ConfigError(f"{segment}: {entry.num_lost} events were lost here; it cannot be replayed")
                    event = POLICY.decode(bytes(entry.event))
                    orders = [POLICY.decode(bytes(order)) for order in entry.orders]
                except (*MALFORMED, ProtocolError) as error:
                    raise ConfigError(f"{segment}: damaged; it cannot be replayed: {error}") from error
                yield entry.now, event, orders


def refuse_used(folder: Path) -> None:
    """Raise ConfigError if a folder holds journals of another run: the two would be read as one."""
    if any(folder.glob(f"*{SUFFIX}")):
        raise ConfigError(f"{folder} holds the journals of an earlier run; give another folder, or empty it")


def read_journals(path: Path) -> list[Recording]:
    """Every object's journal in a folder (or the one object's, of a single file)."""
    files = [path] if path.is_file() else sorted(path.glob(f"*{SUFFIX}"))
    if not files:
        raise ConfigError(f"{path}: no journal here (a folder of *{SUFFIX} files, as `serve --journal` writes)")
    found: dict[tuple[str, int], list[tuple[Header, Path]]] = {}
    for file in files:
        header = _header(file)
        found.setdefault((header.object, header.incarnation), []).append((header, file))
    recordings = []
    for parts in found.values():
        parts.sort(key=lambda part: part[0].segment)
        if parts[0][0].segment != 0 and path.is_dir():
            raise ConfigError(f"{parts[0][1]}: the first segment is missing; it cannot be replayed")
        recordings.append(Recording(parts[0][0], tuple(file for _, file in parts)))
    return recordings


def _header(path: Path) -> Header:
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ConfigError(f"{path}: not a Diptych journal")
        try:
            (size,) = _LENGTH.unpack(file.read(4))
            return msgspec.msgpack.decode(file.read(size), type=Header)
        except (*MALFORMED, struct.error, ConfigError) as error:
            raise ConfigError(f"{path}: its header is damaged: {error}") from error


def _records(path: Path) -> Iterator[bytes]:
    """The raw records of a segment; a torn last one (the process was killed) is left out."""
    data = path.read_bytes()
    (size,) = _LENGTH.unpack_from(data, len(MAGIC))
    at = len(MAGIC) + 4 + size
    while at + 4 <= len(data):
        (size,) = _LENGTH.unpack_from(data, at)
        if at + 4 + size > len(data):
            return
        yield data[at + 4 : at + 4 + size]
        at += 4 + size
