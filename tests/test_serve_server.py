"""Whoever only holds a connection: idlers, slow heads, endless heads, many headers, half a body, a flood of all."""

import asyncio
import http.client
import json
import os
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from serve_doubles import FakeFrontend, Live, byte_level_tokenizer, serving

from diptych.serve.api import Settings
from diptych.serve.outermost import MAX_HEADERS
from diptych.serve.server import MAX_HEAD_BYTES, hang_up_on_idlers, max_connections
from diptych.serve.text import Text

TEXT = Text(byte_level_tokenizer())
BODY = json.dumps({"prompt": "hello world", "stream": True, "max_tokens": 50}).encode()


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with serving(TEXT, FakeFrontend(gap_s=0.01), Settings(body_timeout_s=0.3)) as live:
        yield live


def connect(live: Live, data: bytes = b"") -> socket.socket:
    host, _, port = live.url.removeprefix("http://").partition(":")
    sock = socket.create_connection((host, int(port)), timeout=10)
    if data:
        sock.sendall(data)
    return sock


def head(length: int, path: str = "/v1/completions") -> bytes:
    return f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {length}\r\n\r\n".encode()


def in_loop(live: Live, work: Callable[[], Any]) -> Any:
    """Run something in the server's own loop and thread."""
    done, found = threading.Event(), []
    loop = live.server.servers[0].get_loop()
    loop.call_soon_threadsafe(lambda: (found.append(work()), done.set()))
    assert done.wait(5)
    return found[0]


def look(live: Live) -> None:
    """What the server does every ten seconds."""
    in_loop(live, lambda: hang_up_on_idlers(live.server.server_state.connections))


def is_closed(sock: socket.socket) -> bool:
    """The server hung up; waits for it a little."""
    sock.settimeout(0.3)
    try:
        return sock.recv(1) == b""
    except TimeoutError:
        return False
    except ConnectionError:
        return True


def get(live: Live, path: str = "/health", headers: dict[str, str] | None = None) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection(live.url.removeprefix("http://"), timeout=10)
    connection.request("GET", path, headers=headers or {})
    reply = connection.getresponse()
    reply.body = reply.read()  # type: ignore[attr-defined]
    connection.close()
    return reply


@pytest.mark.parametrize("said", [b"", b"POST /v1/comp", b"GET /health HTTP/1.1\r\nhost: x\r\nslow: "], ids=repr)
def test_who_never_gets_to_a_request_is_hung_up_on(live: Live, said: bytes) -> None:
    with connect(live, said) as sock:
        assert live.wait_until(lambda: len(live.server.server_state.connections) == 1)
        time.sleep(0.02)  # what was said is read
        look(live)
        assert not is_closed(sock), "one look is not enough: it may have come a moment ago"
        look(live)
        assert is_closed(sock)


def test_who_waits_for_an_answer_is_not(live: Live) -> None:
    with connect(live, head(len(BODY)) + BODY) as sock:
        assert sock.recv(10)
        look(live)
        look(live)
        answer = b""
        while b"[DONE]" not in answer:
            answer += sock.recv(1 << 16)
        look(live)
        look(live)
        sock.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")  # kept alive as long as uvicorn says
        assert b"200 OK" in sock.recv(1 << 16)


def test_a_head_without_end(live: Live) -> None:
    with connect(live, b"GET /health HTTP/1.1\r\nx: ") as sock:
        try:
            for _ in range(MAX_HEAD_BYTES // 1024 + 64):
                sock.sendall(b"a" * 1024)
        except ConnectionError:
            return
        assert is_closed(sock)


@pytest.mark.parametrize("headers", [{f"x-{i}": "1" for i in range(MAX_HEADERS + 1)}, {"x": "a" * 40_000}], ids=len)
def test_too_many_headers(live: Live, headers: dict[str, str]) -> None:
    reply = get(live, headers=headers)
    assert reply.status == 431
    assert json.loads(reply.body)["error"]["type"] == "invalid_request_error"  # type: ignore[attr-defined]


def test_a_body_nobody_wants_any_more_is_no_head(live: Live) -> None:
    """It goes on coming after its 404, far over the limit of a head; the connection can be used again."""
    with connect(live, head(1_000_000, "/nowhere")) as sock:
        assert b" 404 " in sock.recv(1 << 16)
        for _ in range(10):
            sock.sendall(b"a" * 100_000)
        sock.sendall(b"GET /version HTTP/1.1\r\nhost: x\r\n\r\n")
        assert b"200 OK" in sock.recv(1 << 16)


def test_half_a_body_is_not_waited_for(live: Live) -> None:
    with connect(live, head(1000) + b'{"prompt": ') as sock:
        answer = sock.recv(1 << 16)
    assert answer.startswith(b"HTTP/1.1 408 ") and b'"error"' in answer


@pytest.mark.parametrize(
    "said", [b"hello\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00", b"\0" * 99]
)
def test_what_is_no_http_gets_a_400(live: Live, said: bytes) -> None:
    with connect(live, said) as sock:
        assert sock.recv(1 << 16).startswith(b"HTTP/1.1 400 ")
        assert is_closed(sock)


def test_pipelined_requests_are_answered_in_order(live: Live) -> None:
    one = b"GET /version HTTP/1.1\r\nhost: x\r\n\r\n"
    with connect(live, one * 3) as sock:
        answer = b""
        while answer.count(b'"version"') < 3:
            part = sock.recv(1 << 16)
            assert part
            answer += part
    assert answer.count(b"HTTP/1.1 200 OK") == 3


def test_descriptors_bound_the_connections() -> None:
    assert 0 < max_connections() < resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def test_a_flood_leaves_nothing_behind(live: Live) -> None:
    """Three hundred connections of all kinds; the server answers others meanwhile and afterwards has what it had."""

    def state() -> tuple[int, int]:
        loop = live.server.servers[0].get_loop()
        return len(live.server.server_state.connections), len(in_loop(live, lambda: asyncio.all_tasks(loop)))

    assert live.wait_until(lambda: not live.server.server_state.connections)
    before, fds = state(), len(os.listdir("/proc/self/fd"))
    kinds = (b"", b"POST /v1/comp", head(1000) + b'{"prompt"', head(len(BODY)) + BODY)
    socks = [connect(live, kinds[i % 4]) for i in range(300)]
    assert all(get(live).status == 200 for _ in range(5))
    with connect(live, head(len(BODY)) + BODY) as sock:
        answer = b""
        while b"[DONE]" not in answer:
            part = sock.recv(1 << 16)
            assert part
            answer += part
    look(live)
    look(live)
    for sock in socks:
        sock.close()
    assert live.wait_until(lambda: state() == before, 10.0), (state(), before)
    assert live.wait_until(lambda: len(os.listdir("/proc/self/fd")) <= fds)
