"""The lean client: against bytes cut anywhere, and against a server that behaves and one that does not."""

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest

from diptych.bench.client import Client, Connection, Record, chat_completion, completion

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":2,"completion_tokens":%d}}\n\n'
DONE = b"data: [DONE]\n\n"


def token(text: str, finish: str = "null") -> bytes:
    choice = f'{{"index":0,"text":{json.dumps(text)},"logprobs":null,"finish_reason":{finish}}}'
    return f'data: {{"id":"x","choices":[{choice}],"usage":null}}\n\n'.encode()


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def reply(*events: bytes) -> bytes:
    return HEAD + b"".join(chunk(event) for event in events) + b"0\r\n\r\n"


WHOLE = reply(token("a"), token('"text":""'), token("\n\n") + token("", '"length"'), USAGE % 3 + DONE)


class Wire(asyncio.Transport):
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""

    def write(self, data: bytes) -> None:  # type: ignore[override]
        self.written += data

    def abort(self) -> None:
        pass


def fed(*parts: bytes, max_tokens: int = 3, exact: bool = True) -> tuple[Record, Connection]:
    """The record of a request whose reply came in these parts."""

    async def main() -> tuple[Record, Connection]:
        connection, record = Connection(exact=exact), Record(max_tokens=max_tokens)
        connection.connection_made(Wire())
        under_way = asyncio.ensure_future(connection.exchange(b"GET", record))
        await asyncio.sleep(0)
        for part in parts:
            connection.data_received(part)
        if not under_way.done():
            await asyncio.sleep(0)
        if not under_way.done():
            connection.connection_lost(None)
        await under_way
        return record, connection

    return asyncio.run(main())


def test_events_with_text_are_tokens_and_nothing_else_is() -> None:
    record, connection = fed(WHOLE)
    assert (len(record.times_s), record.num_tokens, record.error) == (3, 3, "")
    assert record.num_unseen == 0 and record.ended_s >= record.times_s[-1] >= record.sent_s
    assert connection.reusable


def test_it_does_not_matter_where_the_bytes_are_cut() -> None:
    for cut in range(1, len(WHOLE)):
        record, _ = fed(WHOLE[:cut], WHOLE[cut:])
        assert (len(record.times_s), record.num_tokens, record.error) == (3, 3, ""), cut


def test_byte_by_byte() -> None:
    record, _ = fed(*(WHOLE[i : i + 1] for i in range(len(WHOLE))))
    assert (len(record.times_s), record.num_tokens, record.error) == (3, 3, "")


def test_a_last_event_with_text_counts() -> None:
    record, _ = fed(reply(token("a"), token("b", '"stop"'), USAGE % 2), max_tokens=2)
    assert len(record.times_s) == 2 and not record.error


def test_tokens_without_an_event_are_known_from_usage() -> None:
    record, _ = fed(reply(token("a"), USAGE % 3 + DONE))
    assert (len(record.times_s), record.num_unseen, record.error) == (1, 2, "")


def test_an_answer_that_is_too_short_is_an_error() -> None:
    record, _ = fed(reply(token("a"), USAGE % 1 + DONE))
    assert record.error == "1 of 3 tokens came"


def test_a_status_is_an_error_with_its_message() -> None:
    body = b'{"error":{"message":"too many","type":"overloaded"}}'
    record, connection = fed(b"HTTP/1.1 429 Too Many\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
    assert record.error == "429: too many" and not record.times_s and connection.reusable


def test_an_error_event_in_the_stream_is_an_error() -> None:
    record, _ = fed(reply(token("a"), b'data: {"error":{"message":"worker lost"}}\n\n'))
    assert record.error == "worker lost" and len(record.times_s) == 1


def test_a_connection_that_ends_early_is_an_error() -> None:
    record, connection = fed(WHOLE[:200])
    assert record.error.startswith("the connection ended early") and not connection.reusable


def test_what_is_not_http_is_an_error() -> None:
    assert fed(b"SSH-2.0 x y\r\n\r\n")[0].error.startswith("not HTTP")


def test_where_lengths_are_as_they_come_a_short_answer_is_none() -> None:
    record, _ = fed(reply(token("a"), USAGE % 1 + DONE), exact=False)
    assert (record.error, record.num_tokens, record.num_prompt) == ("", 1, 2)


def test_a_server_that_does_not_count_is_counted_for() -> None:
    record, _ = fed(reply(token("a"), token("b"), DONE), max_tokens=2)
    assert (record.num_tokens, record.error) == (2, "")


def test_other_servers_write_json_and_lines_another_way() -> None:
    spaced = [
        token(text, end).replace(b'":', b'": ').replace(b"\n\n", b"\r\n\r\n")
        for text, end in (("a", "null"), ("b", '"stop"'))
    ]
    whole = reply(*spaced, USAGE.replace(b'":', b'": ').replace(b"\n\n", b"\r\n\r\n") % 2)
    for cut in range(1, len(whole)):
        record, _ = fed(whole[:cut], whole[cut:], max_tokens=2)
        assert (len(record.times_s), record.num_tokens, record.error) == (2, 2, ""), cut


def test_a_chat_begins_with_who_speaks() -> None:
    def delta(content: str, finish: str = "null") -> bytes:
        return f'data: {{"choices":[{{"index":0,"delta":{{{content}}},"finish_reason":{finish}}}]}}\n\n'.encode()

    events = (
        delta('"role":"assistant","content":""'),
        delta('"content":"a"'),
        delta('"content":"b"'),
        delta("", '"stop"'),
    )
    record, _ = fed(reply(*events, USAGE % 2), max_tokens=2)
    assert (len(record.times_s), record.num_unseen, record.error) == (2, 0, "")
    assert len(fed(reply(delta('"role":"assistant","content":"a"'), USAGE % 1), max_tokens=1)[0].times_s) == 1


def test_a_usage_that_is_none_is_an_error() -> None:
    assert "usage" in fed(reply(b'data: {"choices":[],"usage":{"completion_tokens":"many"}}\n\n'))[0].error


def test_a_body_asks_for_exactly_so_many_tokens() -> None:
    body = json.loads(completion([1, 2], 5, model="m"))
    assert (body["prompt"], body["max_tokens"], body["ignore_eos"], body["model"]) == ([1, 2], 5, True, "m")
    assert body["stream"] and body["stream_options"]["include_usage"]
    assert json.loads(completion("text", 5))["prompt"] == "text"
    chat = json.loads(chat_completion("hello", 5))
    assert chat["messages"] == [{"role": "user", "content": "hello"}] and chat["max_tokens"] == 5


# --- over a socket ---------------------------------------------------------------------------------------------

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[Any, Any, None]]


async def read_request(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
    return head + await reader.readexactly(length)


async def answering(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A server that answers request after request on one connection."""
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
        while True:
            await read_request(reader)
            writer.write(WHOLE)
    await hang_up(writer)


async def hang_up(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


async def with_server(handler: Handler, use: Callable[[Client], Awaitable[None]]) -> None:
    handled: list[asyncio.Future[None]] = []

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handled.append(asyncio.ensure_future(handler(reader, writer)))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    client = Client("127.0.0.1", server.sockets[0].getsockname()[1])
    try:
        await use(client)
    finally:
        await client.close()
        server.close()
        await asyncio.wait_for(asyncio.gather(*handled), 2.0)


def test_connections_are_used_again() -> None:
    async def use(client: Client) -> None:
        for _ in range(5):
            assert not (await client.send(completion([1], 3), Record(max_tokens=3))).error
        assert client.num_opened == 1
        both = await asyncio.gather(*(client.send(completion([1], 3), Record(max_tokens=3)) for _ in range(2)))
        assert client.num_opened == 2 and not any(record.error for record in both)

    asyncio.run(with_server(answering, use))


def test_headers_are_sent_with_every_request() -> None:
    heads: list[bytes] = []

    async def listening(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await read_request(reader))
        writer.write(WHOLE)
        await hang_up(writer)

    async def use(client: Client) -> None:
        keyed = Client(*client._address, "/base/v1/completions", headers={"authorization": "Bearer k"})
        assert not (await keyed.send(completion([1], 3), Record(max_tokens=3))).error
        await keyed.close()
        assert heads[0].startswith(b"POST /base/v1/completions HTTP/1.1\r\n")
        assert b"\r\nauthorization: Bearer k\r\ncontent-length: " in heads[0]

    asyncio.run(with_server(listening, use))


def test_a_request_that_is_given_up_hangs_up() -> None:
    gone = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        with contextlib.suppress(ConnectionError):
            await reader.read()
        gone.set()
        await hang_up(writer)

    async def use(client: Client) -> None:
        record = Record(max_tokens=3)
        task = asyncio.ensure_future(client.send(completion([1], 3), record))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert record.error == "unfinished"
        await asyncio.wait_for(gone.wait(), 2.0)

    asyncio.run(with_server(silent, use))


def test_nobody_there_is_an_error_not_an_exception() -> None:
    async def main() -> Record:
        server = await asyncio.start_server(answering, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        server.close()
        await server.wait_closed()
        return await Client("127.0.0.1", port).send(completion([1], 3), Record())

    assert asyncio.run(main()).error.startswith("cannot connect")
