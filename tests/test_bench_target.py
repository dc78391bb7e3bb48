"""Where a server is, and how it is asked what it wants."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from diptych.bench.target import Target, parse_target
from diptych.errors import ConfigError


@contextmanager
def answering(models: Any, refuse: str = "") -> Iterator[tuple[str, list[Any]]]:
    """A server that lists models and refuses bodies with a field; yields its URL and the bodies it was sent."""
    bodies: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._say(200, models)

        def do_POST(self) -> None:
            bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            wrong = refuse and refuse in bodies[-1]
            self._say(400 if wrong else 200, {"error": {"message": f"unknown: {refuse}"}} if wrong else {})

        def _say(self, status: int, value: Any) -> None:
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", bodies
        finally:
            server.shutdown()
            thread.join()


def test_urls() -> None:
    assert parse_target("http://host:9/v1/") == Target("host", 9)
    assert parse_target("https://host/base") == Target("host", 443, "/base", True)
    assert parse_target("http://[::1]:80").host == "::1"
    assert parse_target("http://h", chat=True).path == "/v1/chat/completions"
    assert parse_target("http://h", key="k").headers == {"authorization": "Bearer k"}
    for wrong in ("host:9", "ftp://host", "http://", "http://host:port", "http://h:99999"):
        with pytest.raises(ConfigError):
            parse_target(wrong)


def test_the_first_model_is_asked_for() -> None:
    with answering({"data": [{"id": "one"}, {"id": "two"}]}) as (url, bodies):
        assert parse_target(url).asked().model == "one" and bodies[0]["model"] == "one"
        assert parse_target(url, model="mine").asked().model == "mine"


def test_a_server_without_a_list_is_asked_without_a_name() -> None:
    for models in ({}, {"data": []}, [], {"data": [{}]}):
        with answering(models) as (url, bodies):
            assert parse_target(url).asked().model is None and "model" not in bodies[0]


def test_where_ignore_eos_is_unknown_it_is_left_out() -> None:
    with answering({}, refuse="ignore_eos") as (url, bodies):
        found = parse_target(url).asked()
    assert [("ignore_eos" in body) for body in bodies] == [True, False]
    assert found.fields["ignore_eos"] is None


def test_a_server_that_refuses_is_an_error() -> None:
    with answering({}, refuse="prompt") as (url, _), pytest.raises(ConfigError, match="400.*unknown: prompt"):
        parse_target(url).asked()


def test_nobody_there_is_an_error() -> None:
    with pytest.raises(ConfigError, match="does not answer"):
        parse_target("http://127.0.0.1:1").asked()
