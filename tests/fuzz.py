"""Everything that reads what others wrote, given what nobody should write.

    python tests/fuzz.py [--minutes 10] [--only codec,http] [--seed 1]

A target takes a source of chance, makes something, damages it and has it read; what it may raise is in the target, and
anything else is a finding. `tests/test_fuzz.py` runs each for a moment, this file for as long as it is told, one
target after the other, and looks at memory, descriptors and threads: after the first fifth of the time they must not
grow. `hostile.py` has peers that are well-formed and mean
harm. Not responsible for processes (`tests/test_live_hostile.py`).
"""

import argparse
import asyncio
import contextlib
import gc
import json
import logging
import os
import socket
import struct
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from enum import StrEnum
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import httpx
import msgspec
import numpy as np
from hostile import HostilePeer, hostile_worker
from serve_doubles import FakeFrontend, card_of, echo, pooling, write_checkpoint

from diptych import journal
from diptych.bench.client import Connection, Record, completion
from diptych.engine.executor import Sampling, Score
from diptych.errors import BadRequest, ConfigError, DiptychError, ProtocolError, TransferError
from diptych.journal import Journal
from diptych.policy.batching import WorkerSpec
from diptych.policy.messages import Done, Emit, Role, Tick
from diptych.serve import calls, openai, wire
from diptych.serve.api import make_app
from diptych.serve.channel import Channel, call, listen
from diptych.serve.structured import grammar_of
from diptych.serve.text import Text
from diptych.serve.wire import CODEC, Hello
from diptych.transfer import description, frames, handshake, introduction, reach
from diptych.transfer.codec import Staging, rows_of
from diptych.transfer.layout import Layout
from diptych.transfer.pool import Pool
from diptych.transfer.seam import PERMIT_BYTES
from diptych.transfer.serving import answer

Target = Callable[[Random], None]
KEY = "a key of the test"
SLOW_S = 5.0  # one case that takes longer is a finding: nobody waits for a decoder
LAYOUT = Layout.uniform(layers=2, kv_heads=2, head_dim=8, block_size=4, dtype="float32", model="m")

# --- material ---------------------------------------------------------------------------------------------------

NUMBERS = (0, 1, 2, 63, 64, 127, 128, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**62, 2**63 - 1, 2**64 - 1, -1)
NUMBERS += (-2, -(2**31), -(2**63))
REALS = (0.0, -0.0, 1.0, -1.0, 5e-324, 1e308, float("inf"), float("-inf"), float("nan"))
TEXTS = ("", "a", "p0", "d0", "evil", "x" * 300, "\0", "../..", "é\U0001f600", "tcp:h:1", '"', "{", "\n\n", "data: ")
CRUMBS = (b"\xff" * 4, b"\0" * 8, b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff")
CRUMBS += (
    b"\x91" * 3000,
    b"\x81\xa1a" * 3000,
    b"\xdf\xff\xff\xff\xff",
    b"[" * 5000,
    b'{"a":' * 3000,
    b"\xc1",
    b"\xa2\xff\xfe",
)


def make(rng: Random, hint: Any) -> Any:
    """Something of a type, often at the edges of what it can be."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return make(rng, args[0])
    if origin is Literal:
        return rng.choice(args)
    if origin in (Union, types.UnionType):
        return make(rng, rng.choice(args))
    if origin is tuple and args[-1] is Ellipsis:
        return tuple(make(rng, args[0]) for _ in range(rng.choice((0, 1, 2, 3, 40))))
    if origin is tuple:
        return tuple(make(rng, each) for each in args)
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return rng.choice(list(hint))
    if isinstance(hint, type) and issubclass(hint, tuple):
        return hint(*(make(rng, each) for each in get_type_hints(hint).values()))
    plain: dict[Any, Callable[[], Any]] = {
        int: lambda: rng.choice((rng.randrange(300), rng.choice(NUMBERS))),
        float: lambda: rng.choice((rng.random(), rng.choice(REALS))),
        str: lambda: rng.choice(TEXTS),
        bytes: lambda: rng.randbytes(rng.choice((0, 1, 4, 8, 16, 16, 64))),
        bool: lambda: rng.random() < 0.5,
        type(None): lambda: None,
        Sampling: lambda: instance(rng, Sampling),
    }
    return plain[hint]()


def instance(rng: Random, kind: type) -> Any:
    """A message of a kind."""
    return kind(*(make(rng, hint) for hint in get_type_hints(kind, include_extras=True).values()))


def damaged(rng: Random, data: bytes) -> bytes:
    """A few bytes of it changed, taken out, put in, said twice."""
    out = bytearray(data)
    for _ in range(rng.choice((0, 1, 1, 2, 5))):
        at = rng.randrange(len(out) + 1)
        end = min(len(out), at + rng.choice((1, 1, 2, 4, 16, 1000)))
        match rng.randrange(6):
            case 0:
                out[at:end] = rng.randbytes(end - at)
            case 1:
                del out[at:end]
            case 2:
                out[at:at] = rng.choice(CRUMBS)
            case 3:
                out[at:at] = out[at:end]
            case 4:
                out[at:end] = rng.choice((b"\xff", b"\0", b"\x80", b"\x7f")) * (end - at)
            case _:
                del out[at:]
    return bytes(out)


def parts_of(rng: Random, data: bytes) -> list[bytes]:
    """Cut anywhere."""
    cuts = sorted(rng.randrange(len(data) + 1) for _ in range(rng.choice((0, 1, 3, 10))))
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]


# --- the control plane -----------------------------------------------------------------------------------------------


def codec(rng: Random) -> None:
    """Any message, whole or damaged, is a message with numbers in range or a ProtocolError; and it survives a copy."""
    kind = rng.choice([kind for kind, _ in CODEC._decode.values()])
    try:
        message = CODEC.decode(damaged(rng, CODEC.encode(instance(rng, kind))))
    except ProtocolError:
        return
    assert CODEC.decode(CODEC.encode(message)) == message


def attachments(rng: Random) -> None:
    """Tickets, emitted tokens, checksums and reports."""
    ids = [rng.randrange(-5, 400) for _ in range(rng.randrange(5))]
    count = rng.choice((len(ids), len(ids), 0, 3, 2**31, 2**62))
    score = Score(rng.choice(NUMBERS[:-4]), rng.randbytes(rng.choice((4, 8, 5))), rng.randbytes(rng.choice((4, 8))))
    extra = wire.Extra(rng.choice((0, 3, -1)), (score,) * rng.randrange(3), (), rng.randbytes(rng.choice((0, 4, 7))))
    ticket = wire.Ticket(wire.pack_ids(ids), len(ids), instance(rng, Sampling), b"r" * 16)
    state = json.dumps({"running": make(rng, int), "kv": {"bytes": 1}, "last_step_s": make(rng, int)}).encode()
    for read, data in (
        (wire.unpack_ticket, wire.pack(ticket)),
        (partial(wire.unpack_emit, count), wire.pack_emit(wire.pack_ids(ids), extra)),
        (lambda given: wire.unpack_offered(given, count), rng.randbytes(PERMIT_BYTES + 8 * len(ids))),
        (lambda given: wire.unpack_published(given, count), rng.randbytes(PERMIT_BYTES + 8 * len(ids) + 4)),
        (wire.state_of, state),
    ):
        with contextlib.suppress(ProtocolError):
            read(damaged(rng, data))  # type: ignore[operator]


def framing(rng: Random) -> None:
    """The pairs of a frame's body, or ProtocolError; what comes out was in it."""
    entries = [(rng.randbytes(rng.randrange(9)), rng.randbytes(rng.randrange(30))) for _ in range(rng.randrange(4))]
    body = damaged(rng, journal.frame(entries)[4:])
    with contextlib.suppress(ProtocolError):
        assert sum(8 + len(message) + len(rest) for message, rest in journal.entries(body)) == len(body)


class Channels:
    """A listening side. Whoever is a stranger and talks nonsense is hung up on, and costs nobody else anything."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.folder = tempfile.TemporaryDirectory(prefix="fz")
        self.address = f"unix:{self.folder.name}/s"
        self.wrong: list[dict[str, Any]] = []
        self.loop.set_exception_handler(lambda loop, context: self.wrong.append(context))
        self.met: list[Channel] = []
        self.server = self.loop.run_until_complete(listen(self.address, KEY, "you", self._accept))

    def _accept(self, channel: Channel, hello: Hello) -> None:
        self.met.append(channel)
        channel.heard = lambda message, attachment: None

    def __call__(self, rng: Random) -> None:
        self.loop.run_until_complete(asyncio.wait_for(self._case(rng), SLOW_S))
        assert not self.wrong, self.wrong

    async def _case(self, rng: Random) -> None:
        reader, writer = await asyncio.open_unix_connection(self.address.removeprefix("unix:"))
        with contextlib.suppress(ConnectionError):
            (size,) = struct.unpack("<I", await reader.readexactly(4))
            ((said, _),) = journal.entries(await reader.readexactly(size))
            known = rng.random() < 0.5
            words = [instance(rng, kind) for kind, _ in rng.sample(list(CODEC._decode.values()), 3)]
            if known:
                hello = Hello("peer", "me", 1, rng.randbytes(32))
                proof = wire.caller_proof(KEY, CODEC.decode(said).nonce, hello)
                writer.write(journal.frame([(CODEC.encode(replace(hello, proof=proof)), b"")]))
            data = b"".join(journal.frame([(CODEC.encode(word), rng.randbytes(8))]) for word in words)
            for part in parts_of(rng, damaged(rng, data)):
                writer.write(part)
                if rng.random() < 0.3:
                    await asyncio.sleep(0)
            if rng.random() < 0.5:
                writer.write_eof()  # half open
            await writer.drain()
        writer.close() if rng.random() < 0.5 else writer.transport.abort()
        good: list[Channel] = []
        channel = await call(self.address, KEY, Hello("peer", "good", 1), good.append, 5.0)
        assert good == [channel] and channel.is_open
        channel.close()
        self.met.clear()

    def close(self) -> None:
        """Stop listening."""
        self.server.close()
        self.loop.run_until_complete(asyncio.sleep(0.01))
        self.loop.close()
        self.folder.cleanup()


class Journals:
    """A journal on disk, damaged: read, or a ConfigError that names the file."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="fz")
        folder = Path(self.folder.name)
        written = Journal(folder, "w", 0, WorkerSpec("w", Role.MIXED, 10, 4))
        for at in range(5):
            written.record(float(at), Done("p", at), [Emit(at, 0, 1), Tick()])
        written.close()
        (self.path,) = folder.iterdir()
        self.data = self.path.read_bytes()
        assert [len(orders) for _, _, orders in journal.read_journals(folder)[0]] == [2] * 5

    def __call__(self, rng: Random) -> None:
        self.path.write_bytes(damaged(rng, self.data))
        with contextlib.suppress(ConfigError):
            for recording in journal.read_journals(self.path):
                list(recording)

    def close(self) -> None:
        """Remove it."""
        self.folder.cleanup()


# --- the KV plane ----------------------------------------------------------------------------------------------------


def descriptions(rng: Random) -> None:
    """What a peer says of its pool."""
    said = description.Description("shm", "w", 1, LAYOUT, 4, path="/x")
    data = msgspec.msgpack.encode(msgspec.structs.replace(said, num_blocks=make(rng, int), path=make(rng, str)))
    with contextlib.suppress(ProtocolError):
        description.decode(damaged(rng, data), "shm")
    with contextlib.suppress(ProtocolError):
        reach._decode(damaged(rng, msgspec.msgpack.encode(reach.Offer("host", data, data))))


def introductions(rng: Random) -> None:
    """Hellos and answers over TCP, with the right proof under whatever they say: a verdict, or one of our errors."""
    challenge = introduction._CHALLENGE.pack(introduction._MAGIC, rng.randbytes(32))
    said = b"w", 1, LAYOUT.fingerprint().encode()
    body = introduction._HELLO.pack(introduction._MAGIC, rng.randbytes(32), rng.choice((1, 2, 0, 255)), *said)
    body = damaged(rng, body)[: introduction._HELLO.size].ljust(introduction._HELLO.size, b"\0")
    hello = body + introduction.prove(KEY, introduction._READER, challenge, body)
    code = introduction.judge(hello, challenge, KEY, "w", 1, LAYOUT)
    reply = introduction._ANSWER.pack(introduction._MAGIC, code, rng.choice((4, 4, 5, 2**63)))
    reply = damaged(rng, reply)[: introduction._ANSWER.size].ljust(introduction._ANSWER.size, b"\0")
    reply += introduction.prove(KEY, introduction._OWNER, challenge + hello, reply)
    described = description.Description("tcp", "w", 1, LAYOUT, 4)
    with contextlib.suppress(TransferError):
        introduction.check_answer(reply, challenge + hello, described, KEY, "w")


class Requests:
    """Requests for blocks: answered or refused in whole replies, or the reader is hung up on.

    Of a block that no permit is for no byte leaves, whatever is asked.
    """

    PERMIT = bytes(range(PERMIT_BYTES))

    def __init__(self) -> None:
        self.pool = Pool(LAYOUT, 8)
        self.pool.view[7] = 0x5A
        self.staging = Staging(rows_of(LAYOUT))

    def __call__(self, rng: Random) -> None:
        ours, theirs = socket.socketpair()
        ids = np.array([rng.randrange(8) for _ in range(rng.randrange(1, 9))], "<i4").tobytes()
        spans = rng.choice((None, (0, 1), (0, 2), (1, 2), (2, 1), (0, 9))), rng.choice((None, (0, 1), (1, 2), (7, 9)))
        kind = rng.choice(("raw", "int8"))
        permit = rng.choice((self.PERMIT, self.PERMIT, rng.randbytes(PERMIT_BYTES)))
        request = frames.encode_request(frames.Request(rng.randrange(99), len(ids) // 4, *spans, kind, permit), ids)
        with ours, theirs:
            theirs.sendall(damaged(rng, request))
            theirs.shutdown(socket.SHUT_WR)
            with contextlib.suppress(DiptychError, OSError):
                while answer(ours, self.pool, self.staging, self.readable):
                    ours.setblocking(True)
            ours.close()
            said = b""
            with contextlib.suppress(ConnectionResetError):  # what it was asked is not all read
                while part := theirs.recv(1 << 16):
                    said += part
            assert b"\x5a" * 16 not in said and b"\x7f" * 16 not in said  # as it is, as int8; a number is echoed
        head = rng.choice((frames.encode_reply(1, 2, 3), frames.encode_refusal(1, 2)))
        with contextlib.suppress(ProtocolError):
            frames.check_reply(damaged(rng, head), 1, 2, 3)

    def readable(self, permit: bytes, blocks: list[int]) -> bool:
        return permit == self.PERMIT and 7 not in blocks

    def close(self) -> None:
        """Give the memory back."""
        self.pool.close()


class Descriptors:
    """What a source hands over on one host: whatever it is, it is mapped as described or refused, and none leaks."""

    def __init__(self) -> None:
        self.pool = Pool(LAYOUT, 4)

    def __call__(self, rng: Random) -> None:
        before = len(os.listdir("/proc/self/fd"))
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        given = [self._descriptor(rng) for _ in range(rng.choice((0, 1, 1, 1, 2, 5)))]
        say = handshake._ANSWER.pack(b"diptych1", rng.choice((0, 0, 0, 1, 6, 77)), rng.choice((4, 4, 4, 5)))
        with ours, theirs:
            socket.send_fds(theirs, [damaged(rng, say)[:256] or b"x"], given)
            with contextlib.suppress(TransferError, ConfigError, OSError):
                fd = handshake.receive_answer(ours, "w", 4)
                try:
                    mapped = Pool.attach(fd, LAYOUT, 4)
                    assert bytes(mapped.view[3]) == bytes(self.pool.view[3])
                    mapped.close()
                finally:
                    os.close(fd)
        for fd in given:
            os.close(fd)
        assert len(os.listdir("/proc/self/fd")) == before

    def _descriptor(self, rng: Random) -> int:
        match rng.randrange(5):
            case 0:
                return os.dup(self.pool.fd)
            case 1:
                fd = os.memfd_create("short")
                os.truncate(fd, rng.choice((0, 1, 4096)))
                return fd
            case 2:
                return os.open("/dev/null", os.O_RDONLY)
            case 3:
                return os.open("/", os.O_RDONLY)
            case _:
                reading, writing = os.pipe()
                os.close(writing)
                return reading

    def close(self) -> None:
        """Give the memory back."""
        self.pool.close()


# --- the front end ---------------------------------------------------------------------------------------------------

_FIELDS = sorted(get_type_hints(openai.Call))
_BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "hello world", "max_tokens": 4},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4},
    "/v1/embeddings": {"input": "hello"},
    "/v1/score": {"text_1": "hello", "text_2": ["world", "fox"]},
    "/v1/rerank": {"query": "hello", "documents": ["world", {"text": "fox"}]},
    "/v1/classify": {"input": ["hello"]},
    "/tokenize": {"prompt": "hello"},
    "/detokenize": {"tokens": [5, 6]},
}
_TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {}}}}}


def value(rng: Random, depth: int = 0) -> Any:
    """Any JSON."""
    simple = [make(rng, int), make(rng, str), True, None, 0.5, 1e308, 5e-324, "auto", [_TOOL], {"type": "json_object"}]
    if depth > 3 or rng.random() < 0.6:
        return rng.choice(simple)
    if rng.random() < 0.5:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    keys = ("role", "content", "type", "text", "function", "name", "a", "json_schema", "schema", "include_usage", "5")
    return {rng.choice(keys): value(rng, depth + 1) for _ in range(rng.randrange(4))}


class Http:
    """Any body, to any endpoint: an answer, or a 4xx with OpenAI's envelope; and never a 500."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="fz")
        self.text = Text.load(write_checkpoint(Path(self.folder.name)))
        self.loop = asyncio.new_event_loop()
        self.clients, self.frontends = [], []
        for kind in ({}, {"task": "embed", "pooling": "last", "width": 4}):
            card = replace(card_of(self.text, 500), **kind)
            frontend = FakeFrontend(lambda job: echo(job) if job.max_new else pooling(job))
            app = make_app(frontend, self.text, card)
            self.frontends.append(frontend)
            transport = httpx.ASGITransport(app, raise_app_exceptions=True)
            self.clients.append(httpx.AsyncClient(transport=transport, base_url="http://here"))

    def __call__(self, rng: Random) -> None:
        path, body = rng.choice(list(_BODIES.items()))
        call = dict(body)
        for name in rng.sample(_FIELDS, rng.choice((0, 1, 1, 2, 4))) + rng.sample(sorted(body), rng.choice((0, 0, 1))):
            call[name] = value(rng)
        data = json.dumps(call).encode()
        if rng.random() < 0.4:
            data = damaged(rng, data)
        client = rng.choice(self.clients)
        self.loop.run_until_complete(asyncio.wait_for(self._case(client, path, data), SLOW_S))
        for frontend in self.frontends:
            frontend.jobs.clear()
            frontend._tasks = []

    async def _case(self, client: httpx.AsyncClient, path: str, data: bytes) -> None:
        reply = await client.post(path, content=data)
        if reply.status_code != 200:
            assert 400 <= reply.status_code < 500, (path, data, reply.text)
            assert reply.json()["error"]["message"], (path, data, reply.text)

    def close(self) -> None:
        """Close the clients."""
        for client in self.clients:
            self.loop.run_until_complete(client.aclose())
        self.loop.close()
        self.folder.cleanup()


_WRITTEN = ("<tool_call>", "</tool_call>", '{"name": "f", "arguments": {"a": 1}}', '{"name": "f", "parameters": {}}')
_WRITTEN += (
    "<|python_tag|>",
    ";",
    "{",
    "}",
    '"',
    "\\",
    "hello",
    " ",
    "\n",
    '"name"',
    ":",
    "[1, {}]",
    '"arguments": "{}"',
)


def tool_calls(rng: Random) -> None:
    """What a model writes means the same however it is cut, and nothing of it is lost or raised about."""
    written = "".join(rng.choice(_WRITTEN) for _ in range(rng.randrange(12)))
    if rng.random() < 0.3:
        written = damaged(rng, written.encode()).decode(errors="replace")
    form = rng.choice(list(calls.FORMATS.values()))

    def read(pieces: list[str]) -> dict[int, tuple[str, str]]:
        parser = calls.CallParser(form)
        said: dict[int, tuple[str, str]] = {}
        for piece in [found for text in pieces for found in parser.push(text)] + parser.flush():
            name, text = said.get(piece.call, ("", ""))
            said[piece.call] = name + piece.name, text + piece.text
        return said

    cut = [part.decode() for part in parts_of(rng, written.encode("ascii", "ignore"))]
    assert read(cut) == read(["".join(cut)]), cut


_KEYWORDS = ("type", "properties", "items", "anyOf", "enum", "pattern", "minLength", "maxItems", "$ref", "required")


def schema(rng: Random, depth: int = 0) -> Any:
    """A JSON schema, or nearly one."""
    made: dict[str, Any] = {}
    for key in rng.sample(_KEYWORDS, rng.randrange(4)):
        match key:
            case "properties":
                made[key] = {rng.choice("abc"): schema(rng, depth + 1) for _ in range(3)} if depth < 5 else {}
            case "items":
                made[key] = schema(rng, depth + 1) if depth < 5 else True
            case "anyOf":
                made[key] = [schema(rng, depth + 1) for _ in range(3)] if depth < 3 else []
            case "pattern":
                made[key] = rng.choice(("(a+)+$", "(.*a){20}", "[", "a{1000}{1000}", "^(?=x)", "(a|aa)+b{500}"))
            case "$ref":
                made[key] = rng.choice(("#", "#/properties/a", "http://x/y", "#/nowhere"))
            case "type":
                made[key] = rng.choice(("object", "array", "string", "number", "nothing", ["null", "string"]))
            case _:
                made[key] = value(rng)
    return made


class Grammars:
    """Schemas and expressions: refused, or compiled and followed, in bounded time."""

    def __init__(self) -> None:
        from llguidance import LLTokenizer

        self.folder = tempfile.TemporaryDirectory(prefix="fz")
        folder = write_checkpoint(Path(self.folder.name))
        self.card = replace(card_of(Text.load(folder)), structured=True)
        self.tokenizer = LLTokenizer((folder / "tokenizer.json").read_text(), n_vocab=320)

    def __call__(self, rng: Random) -> None:
        from llguidance import LLMatcher

        from diptych.engine.grammar import Matcher, limits

        regex = rng.choice(("(a+)+$", "(.*a){20}.{300}b", "a{1000}{1000}{1000}", "[ab]*a[ab]{200}", "(", "\\p{L}+"))
        said: dict[str, Any] = rng.choice(({"guided_json": schema(rng)}, {"guided_regex": regex + make(rng, str)}))
        try:
            grammar = grammar_of(msgspec.convert(said, openai.Call), self.card)
        except BadRequest:
            return
        matcher, written = Matcher(LLMatcher(self.tokenizer, grammar, limits=limits(), log_level=0), 320), list[int]()
        for _ in range(8):
            allowed = matcher.allowed(written).nonzero()[0]
            if not len(allowed):
                return
            written.append(int(rng.choice(allowed)))

    def close(self) -> None:
        """Remove the tokenizer."""
        self.folder.cleanup()


class BenchClient:
    """A server that answers the load generator with anything: the request ends, and what went wrong is said."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()

    def __call__(self, rng: Random) -> None:
        event = b'data: {"choices": [{"text": "a", "finish_reason": null}]}\n\n'
        usage = b'data: {"choices": [], "usage": {"completion_tokens": 1, "prompt_tokens": 3}}\n\n'
        body = event + usage + b"data: [DONE]\n\n"
        chunked = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts_of(rng, body) if part) + b"0\r\n\r\n"
        head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
        self.loop.run_until_complete(asyncio.wait_for(self._case(rng, damaged(rng, head + chunked)), SLOW_S))

    async def _case(self, rng: Random, data: bytes) -> None:
        ours, theirs = socket.socketpair()
        _, connection = await self.loop.create_connection(Connection, sock=ours)
        record = Record(max_tokens=1)
        sent = asyncio.ensure_future(connection.exchange(completion([1], 1), record))
        for part in parts_of(rng, data):
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                theirs.sendall(part)
            await asyncio.sleep(0)
        theirs.close()
        await sent
        assert record.over
        connection.abort()
        await asyncio.sleep(0)

    def close(self) -> None:
        """End the loop."""
        self.loop.run_until_complete(asyncio.sleep(0))
        self.loop.close()


TARGETS: dict[str, Callable[[], Any]] = {
    "codec": lambda: codec,
    "attachments": lambda: attachments,
    "framing": lambda: framing,
    "channels": Channels,
    "journals": Journals,
    "descriptions": lambda: descriptions,
    "introductions": lambda: introductions,
    "requests": Requests,
    "descriptors": Descriptors,
    "http": Http,
    "tool_calls": lambda: tool_calls,
    "grammars": Grammars,
    "bench_client": BenchClient,
    "hostile_worker": lambda: hostile_worker,
    "hostile_peer": HostilePeer,
}


@contextlib.contextmanager
def target(name: str) -> Iterator[Target]:
    """One target, set up and cleared away."""
    made = TARGETS[name]()
    try:
        yield made
    finally:
        if hasattr(made, "close"):
            made.close()


def belongings() -> tuple[int, int, int]:
    """Resident bytes, descriptors, threads."""
    gc.collect()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    return resident, len(os.listdir("/proc/self/fd")), threading.active_count()


GROWTH_BYTES = 24 << 20  # an allocator is never quite still


def run(name: str, seconds: float, seed: int) -> str:
    """Fuzz one target for so long; a line about it. AssertionError where it took what it did not give back."""
    start, count, slowest, before = time.monotonic(), 0, 0.0, None
    with target(name) as case:
        while (spent := time.monotonic() - start) < seconds:
            if before is None and spent > seconds / 5:
                before = belongings()
            began = time.monotonic()
            try:
                case(Random(f"{seed}/{name}/{count}"))
            except BaseException:
                print(f"{name}: case {count} of seed {seed}", file=sys.stderr)
                raise
            slowest = max(slowest, time.monotonic() - began)
            count += 1
        after = belongings()
    assert slowest < SLOW_S, f"{name}: a case took {slowest:.1f} s"
    assert before is not None
    grown = tuple(b - a for a, b in zip(before, after, strict=True))
    assert grown[0] < GROWTH_BYTES and grown[1] <= 1 and grown[2] <= 8, f"{name}: it grew by {grown}"
    return (
        f"{name:14} {count:9,} cases, slowest {slowest * 1e3:6.1f} ms, grew {grown[0] / 1e6:+.1f} MB, {grown[1]:+} fds"
    )


@cache
def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--only", default=",".join(TARGETS), help="targets, separated by commas")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    return parser


def main() -> None:
    """The command."""
    arguments = _parser().parse_args()
    names = arguments.only.split(",")
    logging.disable()  # what is refused is said to the log, every time
    for name in names:
        print(run(name, 60 * arguments.minutes / len(names), arguments.seed), flush=True)


if __name__ == "__main__":
    main()
