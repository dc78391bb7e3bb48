"""What a worker says about its KV pool so that others can connect: msgpack, small, checked before use.

It travels inside our control messages, but it is a peer's word all the same: size, types and ranges are checked here,
the layout by whoever connects, the memory itself by `Pool.attach`.
"""

from typing import Annotated

import msgspec

from diptych.errors import ConfigError, ProtocolError
from diptych.transfer.layout import Layout
from diptych.transfer.seam import Lane

MAX_BYTES = 64 * 1024

Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
Count = Annotated[int, msgspec.Meta(ge=1, lt=1 << 31)]
Incarnation = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]


class Description(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`path`: for `shm`, the unix socket that hands the memory over. `host`, `port`: for `tcp`, where it is served."""

    kind: Lane
    worker: Name
    incarnation: Incarnation
    layout: Layout
    num_blocks: Count
    path: Annotated[str, msgspec.Meta(max_length=107)] = ""
    host: Annotated[str, msgspec.Meta(max_length=255)] = ""
    port: Annotated[int, msgspec.Meta(ge=0, lt=1 << 16)] = 0


def encode(description: Description) -> bytes:
    """The bytes `Transport.describe` returns. Raises ConfigError where the worker's name or number will not do."""
    data = msgspec.msgpack.encode(description)
    try:
        decode(data, description.kind)
    except ProtocolError as error:
        raise ConfigError(f"worker {description.worker!r} cannot be described: {error}") from error
    return data


def decode(data: bytes, kind: str) -> Description:
    """Check a peer's description. Raises ProtocolError, saying what is wrong with it."""
    if len(data) > MAX_BYTES:
        raise ProtocolError(f"a transport description of {len(data)} bytes; at most {MAX_BYTES} are allowed")
    try:
        description = msgspec.msgpack.decode(data, type=Description)
    except (msgspec.MsgspecError, ConfigError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"not a transport description: {error}") from error
    if description.kind != kind:
        raise ProtocolError(f"worker {description.worker} offers {description.kind!r} transport, this is {kind!r}")
    return description
