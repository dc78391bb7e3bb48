"""The few bytes two workers of one host exchange before a pool's descriptor changes hands.

    reader -> owner   HELLO   magic, layout fingerprint, incarnation expected
    owner -> reader   ANSWER  magic, code, num_blocks   (+ the memfd, where the code is OK)
    owner -> reader   BYE     the owner is closing: finish what you read and hang up

After that silence; what counts is the end of the connection. Messages are datagrams on a SOCK_SEQPACKET unix socket,
so none comes in halves. Both sides check that the other runs under the same user id: whoever holds the descriptor
reads all KV.

Not responsible for waiting (`shm.py`, `exporter.py`).
"""

import contextlib
import os
import socket
import struct
from enum import IntEnum

from diptych.errors import LayoutMismatch, PeerLost, ProtocolError
from diptych.transfer.layout import Layout

_MAGIC = b"diptych1"
_HELLO = struct.Struct("<8s32sQ")
_ANSWER = struct.Struct("<8sBQ")
BYE = b"bye"
MAX_MESSAGE = 256
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid


class Code(IntEnum):
    """What the owner answers."""

    OK = 0
    OTHER_LAYOUT = 1
    OTHER_INCARNATION = 2
    CLOSING = 3
    MALFORMED = 4
    OTHER_WORKER = 5
    WRONG_KEY = 6


def new_socket() -> socket.socket:
    """A non-blocking socket of the kind both sides use."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.setblocking(False)
    return sock


def check_user(sock: socket.socket) -> int:
    """The peer's process id. Raises ProtocolError where it runs under another user id than ours."""
    pid, uid, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    if uid != os.geteuid():
        raise ProtocolError(f"the process at the other end (pid {pid}) runs as user {uid}, not {os.geteuid()}")
    return int(pid)


def hello(layout: Layout, incarnation: int) -> bytes:
    """What a reader says first."""
    return _HELLO.pack(_MAGIC, layout.fingerprint().encode(), incarnation)


def judge(message: bytes, layout: Layout, incarnation: int) -> Code:
    """The owner's verdict on a reader's hello."""
    if len(message) != _HELLO.size:
        return Code.MALFORMED
    magic, fingerprint, expected = _HELLO.unpack(message)
    if magic != _MAGIC:
        return Code.MALFORMED
    if expected != incarnation:
        return Code.OTHER_INCARNATION
    return Code.OK if fingerprint == layout.fingerprint().encode() else Code.OTHER_LAYOUT


def send_answer(sock: socket.socket, code: Code, num_blocks: int, fd: int) -> None:
    """Answer a reader; the descriptor goes with it only where the answer is yes. Raises OSError."""
    message = _ANSWER.pack(_MAGIC, code, num_blocks)
    if code is Code.OK:
        socket.send_fds(sock, [message], [fd])
    else:
        sock.send(message)


def receive_answer(sock: socket.socket, name: str, num_blocks: int) -> int:
    """The descriptor of the owner's memory, now ours to close. The socket must be readable.

    Raises PeerLost, LayoutMismatch or ProtocolError, with every descriptor closed.
    """
    message, fds, _, _ = socket.recv_fds(sock, MAX_MESSAGE, 1, socket.MSG_CMSG_CLOEXEC)
    try:
        _check_answer(message, name, num_blocks)
        if len(fds) != 1:
            raise ProtocolError(f"{name} sent {len(fds)} descriptors instead of its pool's")
    except BaseException:
        for fd in fds:
            with contextlib.suppress(OSError):
                os.close(fd)
        raise
    return fds[0]


def _check_answer(message: bytes, name: str, num_blocks: int) -> None:
    if not message:
        raise PeerLost(f"{name} hung up during the handshake")
    if len(message) != _ANSWER.size:
        raise ProtocolError(f"{name} answered with {len(message)} bytes that are no answer")
    magic, code, actual = _ANSWER.unpack(message)
    if magic != _MAGIC:
        raise ProtocolError(f"{name} does not speak this protocol")
    check_code(code, name, num_blocks, actual)


def check_code(code: int, name: str, num_blocks: int, actual: int) -> None:
    """Raise what an answer means unless it is yes: PeerLost, LayoutMismatch or ProtocolError, in words."""
    match code:
        case Code.OK if actual == num_blocks:
            return
        case Code.OK:
            raise ProtocolError(f"{name} described {num_blocks} blocks but has {actual}")
        case Code.OTHER_LAYOUT:
            raise LayoutMismatch(f"{name} does not have the layout it described; was the description altered?")
        case Code.OTHER_INCARNATION:
            raise PeerLost(f"{name} was replaced by another incarnation")
        case Code.OTHER_WORKER:
            raise PeerLost(f"another worker has the address of {name}")
        case Code.WRONG_KEY:
            raise ProtocolError(f"{name} does not accept our key: the two have different cluster keys")
        case Code.CLOSING:
            raise PeerLost(f"{name} is closing")
        case _:
            raise ProtocolError(f"{name} refused the handshake (code {code})")
