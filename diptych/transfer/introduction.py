"""What two workers say to each other over TCP before a block moves: who they are, proved by the cluster's key.

    owner  -> reader  CHALLENGE  magic, nonce
    reader -> owner   HELLO      magic, nonce, purpose, worker, incarnation and layout expected; HMAC of it all
    owner  -> reader  ANSWER     magic, code, num_blocks; HMAC of it all

An HMAC covers everything said before it, so each side knows that the other has the key, now, for this connection: a
recorded introduction is of no use later, and the key never travels. All messages have fixed sizes, and the owner
reads nothing else from a caller whose proof is wrong. What follows is neither encrypted nor signed: like every
interconnect of this kind it is for a network where nobody changes packets on their way.

Not responsible for how long it may take: callers set the deadline.
"""

import asyncio
import hmac
import secrets
import socket
import struct
from enum import IntEnum

from diptych.errors import PeerLost, ProtocolError
from diptych.transfer.description import Description
from diptych.transfer.handshake import Code, check_code
from diptych.transfer.layout import Layout

_MAGIC = b"diptcp-2"  # whenever anything that is said on these connections changes (`frames.py`), this does
_NONCE_BYTES = _PROOF_BYTES = 32
_CHALLENGE = struct.Struct(f"<8s{_NONCE_BYTES}s")
_HELLO = struct.Struct(f"<8s{_NONCE_BYTES}sB64sQ32s")
_ANSWER = struct.Struct("<8sBQ")
_READER, _OWNER = b"diptych reader", b"diptych owner"  # so that neither's proof can be sent back as the other's


class Purpose(IntEnum):
    """What a connection is for."""

    READ = 1  # requests and replies
    WATCH = 2  # silence: its end, or a goodbye, is all there is to hear


async def introduce(sock: socket.socket, said: Description, key: str, purpose: Purpose, name: str) -> None:
    """The reader's side, on a connected non-blocking socket.

    Raises PeerLost, LayoutMismatch, ProtocolError where the owner is not the one described, or not of our cluster.
    """
    challenge = await _receive(sock, _CHALLENGE.size, name)
    if not challenge.startswith(_MAGIC):
        raise ProtocolError(f"{name} does not speak this protocol: it says {challenge[:8]!r}, and we {_MAGIC!r}")
    nonce = secrets.token_bytes(_NONCE_BYTES)
    expected = said.worker.encode(), said.incarnation, said.layout.fingerprint().encode()
    hello = _HELLO.pack(_MAGIC, nonce, purpose, *expected)
    hello += prove(key, _READER, challenge, hello)
    await asyncio.get_running_loop().sock_sendall(sock, hello)
    answer = await _receive(sock, _ANSWER.size + _PROOF_BYTES, name)
    check_answer(answer, challenge + hello, said, key, name)


def check_answer(answer: bytes, before: bytes, said: Description, key: str, name: str) -> None:
    """Raise what an owner's answer means, unless it is yes and proved. `before`: all that was said until then."""
    body, proof = answer[: _ANSWER.size], answer[_ANSWER.size :]
    magic, code, num_blocks = _ANSWER.unpack(body)
    if magic != _MAGIC:
        raise ProtocolError(f"{name} does not speak this protocol")
    if code != Code.WRONG_KEY and not hmac.compare_digest(proof, prove(key, _OWNER, before, body)):
        raise ProtocolError(f"whoever answers as {name} does not know the cluster's key")
    check_code(code, name, said.num_blocks, num_blocks)


async def meet(
    sock: socket.socket, key: str, worker: str, incarnation: int, layout: Layout, num_blocks: int
) -> Purpose:
    """The owner's side: what an authenticated reader wants. Raises PeerLost, ProtocolError, OSError for any other."""
    loop = asyncio.get_running_loop()
    challenge = _CHALLENGE.pack(_MAGIC, secrets.token_bytes(_NONCE_BYTES))
    await loop.sock_sendall(sock, challenge)
    hello = await _receive(sock, _HELLO.size + _PROOF_BYTES, "a caller")
    code = judge(hello, challenge, key, worker, incarnation, layout)
    body = _ANSWER.pack(_MAGIC, code, num_blocks)
    proof = bytes(_PROOF_BYTES) if code is Code.WRONG_KEY else prove(key, _OWNER, challenge + hello, body)
    await loop.sock_sendall(sock, body + proof)
    if code is not Code.OK:
        raise ProtocolError(f"refused: {code.name.lower().replace('_', ' ')}")
    return Purpose(_HELLO.unpack(hello[: _HELLO.size])[2])


def judge(hello: bytes, challenge: bytes, key: str, worker: str, incarnation: int, layout: Layout) -> Code:
    """The owner's verdict on a hello. Nothing in it is looked at before its proof."""
    body, proof = hello[: _HELLO.size], hello[_HELLO.size :]
    if not hmac.compare_digest(proof, prove(key, _READER, challenge, body)):
        return Code.WRONG_KEY
    magic, _, purpose, name, expected, fingerprint = _HELLO.unpack(body)
    if magic != _MAGIC or purpose not in set(Purpose):
        return Code.MALFORMED
    if name.rstrip(b"\0") != worker.encode():
        return Code.OTHER_WORKER
    if expected != incarnation:
        return Code.OTHER_INCARNATION
    return Code.OK if fingerprint == layout.fingerprint().encode() else Code.OTHER_LAYOUT


def prove(key: str, who: bytes, before: bytes, body: bytes) -> bytes:
    """HMAC-SHA256 (RFC 2104) of who speaks, all that was said, and what is being said."""
    return hmac.digest(key.encode(), who + before + body, "sha256")


async def _receive(sock: socket.socket, num_bytes: int, name: str) -> bytes:
    """Exactly so many bytes; not one more is taken from the socket."""
    loop, got = asyncio.get_running_loop(), b""
    while len(got) < num_bytes:
        part = await loop.sock_recv(sock, num_bytes - len(got))
        if not part:
            raise PeerLost(f"{name} hung up during the handshake")
        got += part
    return got
