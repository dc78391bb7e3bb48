"""The frames of a KV stream over TCP, after the introduction: fixed sizes, little-endian, indices and never addresses.

    reader -> owner   REQUEST  magic, blocks, number of the request, layers, heads, codec, permit; then int32 ids
    owner -> reader   REPLY    magic, code, blocks, number of the request, bytes, nanoseconds of encoding; the bytes

Replies come in the order of the requests. One that says REFUSED has no bytes: the permit is not good for these blocks
(any more), which is no fault of the connection. A request is for a bounded number of blocks, so it is small, whatever
its plan, and what is still on its way after an abort is bounded too. Nothing here waits or touches memory.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum

from diptych.errors import ProtocolError
from diptych.transfer.seam import NO_PERMIT, PERMIT_BYTES, Codec

MAX_BLOCKS = 1024  # of one request
_REQUEST = struct.Struct(f"<IIQIIIII{PERMIT_BYTES}s")
_REPLY = struct.Struct("<IIIQQQ")
_MAGIC = 0x51445003
_CODECS: tuple[Codec, ...] = ("raw", "int8")
REQUEST_BYTES, REPLY_BYTES = _REQUEST.size, _REPLY.size
GOODBYE = b"\x04"  # on the watching connection: the owner is closing; finish what you read and hang up

Range = tuple[int, int] | None


class Code(IntEnum):
    """What a reply is."""

    OK = 0
    REFUSED = 1


@dataclass(frozen=True, slots=True)
class Request:
    """What a reader wants; None for a range means all there are."""

    number: int
    num_blocks: int
    layers: Range
    heads: Range
    codec: Codec = "raw"
    permit: bytes = NO_PERMIT


def encode_request(request: Request, ids: bytes) -> bytes:
    """A request with its ids (int32, little-endian)."""
    ranges = *(request.layers or (0, 0)), *(request.heads or (0, 0))
    codec = _CODECS.index(request.codec)
    return _REQUEST.pack(_MAGIC, request.num_blocks, request.number, *ranges, codec, request.permit) + ids


def decode_request(head: bytes) -> Request:
    """The fixed part of a request. Raises ProtocolError; whether ids and ranges exist is the pool's and layout's."""
    if len(head) != _REQUEST.size:
        raise ProtocolError(f"a request ended after {len(head)} bytes of {_REQUEST.size}")
    magic, num_blocks, number, *ranges, codec, permit = _REQUEST.unpack(head)
    if magic != _MAGIC:
        raise ProtocolError("a request does not begin like one")
    if not 1 <= num_blocks <= MAX_BLOCKS:
        raise ProtocolError(f"a request for {num_blocks} blocks; 1 to {MAX_BLOCKS} are allowed")
    if codec >= len(_CODECS):
        raise ProtocolError(f"a request for codec {codec}, which is not known")
    return Request(number, num_blocks, _range(*ranges[:2]), _range(*ranges[2:]), _CODECS[codec], permit)


def _range(first: int, end: int) -> Range:
    return (first, end) if first or end else None


def encode_reply(number: int, num_blocks: int, num_bytes: int, encode_s: float = 0.0) -> bytes:
    """What comes before a reply's bytes."""
    return _REPLY.pack(_MAGIC, Code.OK, num_blocks, number, num_bytes, int(encode_s * 1e9))


def encode_refusal(number: int, num_blocks: int) -> bytes:
    """All of a reply that says no."""
    return _REPLY.pack(_MAGIC, Code.REFUSED, num_blocks, number, 0, 0)


def check_reply(head: bytes, number: int, num_blocks: int, num_bytes: int) -> float | None:
    """Seconds that encoding took, None for a refusal; raises ProtocolError unless it is the reply that is due."""
    if len(head) != _REPLY.size:
        raise ProtocolError(f"a reply ended after {len(head)} bytes of {_REPLY.size}")
    magic, code, *said, encode_ns = _REPLY.unpack(head)
    if magic == _MAGIC and code == Code.OK and said == [num_blocks, number, num_bytes]:
        return float(encode_ns) / 1e9
    if magic == _MAGIC and code == Code.REFUSED and said == [num_blocks, number, 0]:
        return None
    raise ProtocolError(f"what came is not the reply to request {number} ({num_blocks} blocks, {num_bytes} bytes)")
