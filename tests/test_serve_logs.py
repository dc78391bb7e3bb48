"""Lines of the log: the same facts as text and as JSON, one line for each request, and never any of the text."""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from serve_doubles import FakeFrontend, byte_level_tokenizer, saying, serving

from diptych.errors import Overloaded
from diptych.policy.messages import Reason
from diptych.serve import logs
from diptych.serve.frontend import Chunk
from diptych.serve.text import Text

TEXT = Text(byte_level_tokenizer())
PROMPT = "a secret that no log may have"


@contextmanager
def recorded() -> Iterator[list[dict[str, Any]]]:
    """The facts of the lines that requests leave."""
    lines: list[dict[str, Any]] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(json.loads(logs.Json("api").format(record)))  # type: ignore[method-assign]
    logger = logging.getLogger("diptych.serve.outermost")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def lines_after(frontend: FakeFrontend, act: Callable[[str], object], num: int = 1) -> list[dict[str, Any]]:
    with recorded() as lines, serving(TEXT, frontend) as live:
        act(live.url)
        assert live.wait_until(lambda: len(lines) >= num)
    assert "secret" not in json.dumps(lines)
    return lines


def complete(url: str, **fields: Any) -> httpx.Response:
    body = {"prompt": PROMPT, "max_tokens": 4, **fields}
    return httpx.post(f"{url}/v1/completions", json=body, headers={"x-request-id": "mine"})


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_leaves_one_line(stream: bool) -> None:
    replies: list[httpx.Response] = []
    (line,) = lines_after(FakeFrontend(), lambda url: replies.append(complete(url, stream=stream)))
    assert line["reply"].startswith("cmpl-") and line["reply"] in replies[0].text
    assert (line["process"], line["level"], line["message"]) == ("api", "info", "request")
    assert (line["request"], line["method"], line["route"], line["status"]) == ("mine", "POST", "/v1/completions", 200)
    assert (line["prompt_tokens"], line["cached_tokens"], line["output_tokens"]) == (len(TEXT.encode(PROMPT)), 3, 4)
    assert line["finish"] == "length" and 0 < line["ttft_s"] <= line["seconds"]


def test_what_was_refused_says_so() -> None:
    (line,) = lines_after(FakeFrontend(), lambda url: complete(url, temperature=9))
    assert line["status"] == 400 and "finish" not in line
    (line,) = lines_after(FakeFrontend(refuse=Overloaded("full")), complete)
    assert (line["status"], line["finish"], line["output_tokens"]) == (429, "rejected", 0) and "ttft_s" not in line


def test_a_client_that_leaves_is_cancelled() -> None:
    def leave(url: str) -> None:
        with httpx.stream("POST", f"{url}/v1/completions", json={"prompt": PROMPT, "stream": True}) as reply:
            next(reply.iter_bytes())

    (line,) = lines_after(FakeFrontend(gap_s=0.05), leave)
    assert (line["status"], line["finish"]) == (200, "cancelled")


def test_a_path_of_a_strangers_making_is_not_taken_over() -> None:
    (line,) = lines_after(FakeFrontend(), lambda url: httpx.get(f"{url}/secret%0Aforged line"))
    assert (line["route"], line["status"]) == ("-", 404)


def test_what_a_client_puts_into_a_path_is_not_in_its_line() -> None:
    def look(url: str) -> None:
        httpx.get(f"{url}/requests/secret/more")
        httpx.post(f"{url}/workers/secret/drain")

    lines = lines_after(FakeFrontend(), look, 2)
    assert [line["route"] for line in lines] == ["/requests/{id}", "/workers/{id}/drain"]


def test_probes_leave_no_lines() -> None:
    def probe(url: str) -> None:
        httpx.get(f"{url}/health")
        httpx.get(f"{url}/metrics")
        httpx.get(f"{url}/version")

    (line,) = lines_after(FakeFrontend(saying(Chunk([], Reason.STOP))), probe)
    assert line["route"] == "/version"


def record(level: int, message: str, **fields: Any) -> logging.LogRecord:
    made = logging.LogRecord("diptych.x", level, __file__, 1, message, None, None)
    made.fields = fields
    return made


def test_text_has_the_same_facts() -> None:
    line = logs.Lines("d0").format(record(logging.WARNING, "slow", seconds=1.5, finish="", why="a b"))
    assert line.endswith("d0 WARNING slow seconds=1.5 why=a b") and line[:2] == "20"


def test_an_error_is_one_line_of_json() -> None:
    made = record(logging.ERROR, "failed")
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        made.exc_info = (ValueError, error, error.__traceback__)
    line = logs.Json("d0").format(made)
    assert "\n" not in line and "ValueError: two\nlines" in json.loads(line)["error"]


def test_setting_up(capfd: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        logs.set_up("router", "json", "info")
        logging.getLogger("diptych.test").info("ready", extra={"fields": {"workers": 2}})
        logging.getLogger("diptych.test").debug("not this")
    finally:
        root.handlers[:] = before
        root.setLevel(level)
    (line,) = capfd.readouterr().err.splitlines()
    assert json.loads(line).items() >= {"process": "router", "message": "ready", "workers": 2}.items()
