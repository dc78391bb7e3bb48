"""A lean HTTP/1.1 client for streamed completions: what it costs must not show in what it measures.

One `asyncio.Protocol` per connection, kept alive and used again; no HTTP library, no JSON decoding per token. An event
counts as a token if it carries text or says that the answer goes on; the reply's `usage` says how many tokens there
really were, so tokens that made no event of their own are counted too (`Record.num_unseen`). Not responsible for when
requests are sent (`load.py`) or what their times mean (`report.py`).
"""

import asyncio
import contextlib
import re
import socket
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from time import perf_counter
from typing import Any

import msgspec

# Servers write JSON with and without spaces, and end events with either kind of line.
_EVENT_END = re.compile(rb"\r?\n\r?\n")
_GOES_ON = re.compile(rb'"finish_reason": ?null')
_USAGE = re.compile(rb'"usage": ?\{')
_TEXT = re.compile(rb'"(?:text|content)": ?"[^"]')
_ROLE_ALONE = re.compile(rb'"role": ?"assistant"[^}]*"content": ?(?:""|null)')


@dataclass(slots=True)
class Record:
    """One request, on the clock `time.perf_counter`. `due_s` is when it should have been sent."""

    kind: str = ""
    num_prompt: int = 0
    max_tokens: int = 0
    due_s: float = 0.0
    sent_s: float = 0.0
    times_s: list[float] = field(default_factory=list)  # when each event with text came
    ended_s: float = 0.0
    num_tokens: int = 0  # as the server counts them
    error: str = ""

    @property
    def over(self) -> bool:
        """It ended, one way or the other."""
        return self.ended_s > 0

    @property
    def num_unseen(self) -> int:
        """Tokens that made no event of their own: special ones, halves of characters."""
        return self.num_tokens - len(self.times_s)


def completion(prompt: str | list[int], max_tokens: int, **fields: Any) -> bytes:
    """The body of a streamed completion of exactly `max_tokens` tokens. A field that is None is left out."""
    return _body({"prompt": prompt}, max_tokens, fields)


def chat_completion(prompt: str, max_tokens: int, **fields: Any) -> bytes:
    """The same of a chat with one message."""
    return _body({"messages": [{"role": "user", "content": prompt}]}, max_tokens, fields)


def _body(prompt: Mapping[str, Any], max_tokens: int, fields: Mapping[str, Any]) -> bytes:
    call: dict[str, Any] = {
        **prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **fields,
    }
    return msgspec.json.encode({name: value for name, value in call.items() if value is not None})


class Client:
    """Connections to one server. `send` opens one where none is idle, so requests never wait for each other.

    exact: an answer shorter than asked for is an error; otherwise lengths are as they come.
    """

    def __init__(
        self,
        host: str,
        port: int,
        path: str = "/v1/completions",
        *,
        tls: ssl.SSLContext | None = None,
        headers: Mapping[str, str] | None = None,
        exact: bool = True,
    ):
        self._address, self._tls, self._exact = (host, port), tls, exact
        lines = {"host": f"{host}:{port}", "content-type": "application/json", **(headers or {})}
        self._head = "\r\n".join([f"POST {path} HTTP/1.1", *(f"{k}: {v}" for k, v in lines.items()), ""]).encode()
        self._idle: list[Connection] = []
        self._open: set[Connection] = set()
        self.num_opened = 0

    async def send(self, body: bytes, record: Record) -> Record:
        """Send one request and fill its record. Does not raise: what went wrong is the record's `error`."""
        try:
            connection = await self._connection()
        except OSError as error:
            record.sent_s = record.ended_s = perf_counter()
            record.error = f"cannot connect: {error.strerror or error}"
            return record
        request = b"%scontent-length: %d\r\n\r\n%s" % (self._head, len(body), body)
        try:
            await connection.exchange(request, record)
        except asyncio.CancelledError:
            record.error, record.ended_s = record.error or "unfinished", perf_counter()
            connection.abort()
            raise
        if connection.reusable:
            self._idle.append(connection)
        else:
            connection.abort()
        return record

    async def warm(self, num: int) -> None:
        """Open that many connections, so that the first requests need not."""
        self._idle += await asyncio.gather(*(self._connect() for _ in range(num)))

    async def close(self) -> None:
        """Close every connection."""
        for connection in self._open:
            connection.abort()
        while self._open:
            await asyncio.sleep(0)

    async def _connection(self) -> "Connection":
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable:
                return connection
        return await self._connect()

    async def _connect(self) -> "Connection":
        loop = asyncio.get_running_loop()
        made = loop.create_connection(
            lambda: Connection(self._open.discard, self._exact), *self._address, ssl=self._tls
        )
        _, connection = await made
        self.num_opened += 1
        self._open.add(connection)
        return connection


class _Usage(msgspec.Struct, frozen=True):
    completion_tokens: int
    prompt_tokens: int = 0


class _Counted(msgspec.Struct, frozen=True):
    usage: _Usage


class _At(Enum):
    HEAD = auto()
    SIZE = auto()
    CHUNK = auto()
    WHOLE = auto()
    OVER = auto()


class Connection(asyncio.Protocol):
    """One HTTP/1.1 connection, one request at a time. `lost` is called when it is closed."""

    def __init__(self, lost: "Callable[[Connection], None]" = lambda connection: None, exact: bool = True) -> None:
        self.reusable = True
        self._exact = exact
        self._lost = lost
        self._transport: asyncio.Transport
        self._record = Record()
        self._done: asyncio.Future[None] | None = None
        self._at = _At.OVER
        self._data = b""  # received and not parsed yet
        self._need = 0  # bytes of the chunk, or of the whole body
        self._events = b""  # an event whose end has not come
        self._status = 200

    async def exchange(self, request: bytes, record: Record) -> None:
        """Send a request and wait for the end of its reply."""
        self._record = record
        self._done = asyncio.get_running_loop().create_future()
        self._at, self._data, self._events = _At.HEAD, b"", b""
        record.sent_s = perf_counter()
        self._transport.write(request)
        await self._done

    def abort(self) -> None:
        """Hang up at once; what is under way is not told."""
        self.reusable = False
        self._at = _At.OVER
        self._transport.abort()

    # --- asyncio.Protocol ----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        sock = transport.get_extra_info("socket")
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        now = perf_counter()
        self._data = self._data + data if self._data else data
        try:
            while self._parse(now):
                pass
        except ValueError as error:
            self._fail(f"not HTTP: {error}")

    def connection_lost(self, error: Exception | None) -> None:
        self.reusable = False
        if self._at is not _At.OVER:
            self._fail(f"the connection ended early: {error or 'closed by the server'}")
        self._lost(self)

    # --- HTTP ----------------------------------------------------------------------------------------------------

    def _parse(self, now: float) -> bool:
        """Take the next part off what was received; False where more is needed."""
        match self._at:
            case _At.SIZE:
                return self._parse_size(now)
            case _At.CHUNK:
                if len(self._data) < self._need + 2:
                    return False
                self._take(self._data[: self._need], now)
                self._data = self._data[self._need + 2 :]
                self._at = _At.SIZE
                return True
            case _At.HEAD:
                return self._parse_head()
            case _At.WHOLE:
                if len(self._data) < self._need:
                    return False
                self._take(self._data[: self._need], now)
                self._end(now)
        return False

    def _parse_size(self, now: float) -> bool:
        size, end, rest = self._data.partition(b"\r\n")
        if not end:
            return False
        self._need = int(size.partition(b";")[0], 16)
        if self._need:
            self._data = rest
            self._at = _At.CHUNK
            return True
        if not rest.startswith(b"\r\n"):  # no trailers: nobody we speak to sends any
            return False
        self._end(now)
        return False

    def _parse_head(self) -> bool:
        head, end, rest = self._data.partition(b"\r\n\r\n")
        if not end:
            return False
        status, *lines = head.lower().split(b"\r\n")
        headers = {line.partition(b":")[0]: line.partition(b":")[2].strip() for line in lines}
        self._status = int(status.split(b" ", 2)[1]) if status.startswith(b"http/1.") else 0
        if not self._status:
            raise ValueError(f"{status[:40]!r} is no status line")
        self.reusable = self.reusable and headers.get(b"connection") != b"close"
        self._data = rest
        if headers.get(b"transfer-encoding") == b"chunked":
            self._at = _At.SIZE
        else:
            self._at, self._need = _At.WHOLE, int(headers.get(b"content-length", b"0"))
        return True

    # --- server-sent events --------------------------------------------------------------------------------------

    def _take(self, data: bytes, now: float) -> None:
        *events, self._events = _EVENT_END.split(self._events + data)
        if self._status != 200:
            self._events = self._events if not events else b"\n\n".join([*events, self._events])
            return
        record = self._record
        for event in events:
            if _GOES_ON.search(event):
                if not _ROLE_ALONE.search(event):  # a chat's first event says only who speaks
                    record.times_s.append(now)
            elif _USAGE.search(event):
                self._count(event)
            elif _TEXT.search(event):
                record.times_s.append(now)
            elif event.lstrip().startswith(b'data: {"error"'):
                record.error = _why(event.partition(b"data: ")[2])

    def _count(self, event: bytes) -> None:
        try:
            usage = msgspec.json.decode(event.partition(b"data: ")[2], type=_Counted).usage
        except msgspec.DecodeError as error:
            raise ValueError(f"an event's usage: {error}") from None
        self._record.num_tokens = usage.completion_tokens
        self._record.num_prompt = usage.prompt_tokens or self._record.num_prompt

    def _end(self, now: float) -> None:
        record = self._record
        record.ended_s = now
        record.num_tokens = record.num_tokens or len(record.times_s)  # a server that does not count
        if self._status != 200:
            record.error = f"{self._status}: {_why(self._events)}"
        elif not record.error and self._exact and record.num_tokens != record.max_tokens:
            record.error = f"{record.num_tokens} of {record.max_tokens} tokens came"
        self._finish()

    def _fail(self, why: str) -> None:
        self.reusable = False
        self._record.ended_s = perf_counter()
        self._record.error = why
        self._finish()

    def _finish(self) -> None:
        self._at, self._data = _At.OVER, b""
        if self._done is not None and not self._done.done():
            self._done.set_result(None)


def _why(body: bytes) -> str:
    """The message of OpenAI's error envelope."""
    try:
        return str(msgspec.json.decode(body)["error"]["message"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return body[:200].decode(errors="replace")
