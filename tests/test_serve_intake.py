"""Bodies and texts are taken in up to their limits."""

import asyncio
import threading

import pytest
from serve_doubles import byte_level_tokenizer, card_of
from starlette.requests import Request

from diptych.errors import BadRequest, TooLarge
from diptych.serve.intake import aside, check_size, read_body
from diptych.serve.text import Text


def request_of(*parts: bytes, length: int | None = None) -> Request:
    """A request whose body comes in these parts."""
    messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    waiting = iter([*messages, {"type": "http.request", "body": b"", "more_body": False}])

    async def receive() -> dict[str, object]:
        return next(waiting)

    headers = [] if length is None else [(b"content-length", str(length).encode())]
    return Request({"type": "http", "headers": headers}, receive)


def test_a_body_comes_whole_or_not_at_all() -> None:
    assert asyncio.run(read_body(request_of(b"ab", b"cd"), 4, 5.0)) == b"abcd"
    for request in (request_of(b"ab", b"cde"), request_of(length=5)):
        with pytest.raises(TooLarge, match="over 4 bytes"):
            asyncio.run(read_body(request, 4, 5.0))


def test_long_work_goes_to_a_thread() -> None:
    here = threading.get_ident()
    assert asyncio.run(aside(10, threading.get_ident)) == here != asyncio.run(aside(10**6, threading.get_ident))


def test_a_text_that_cannot_fit_is_refused_before_it_is_encoded() -> None:
    text = Text(byte_level_tokenizer())
    card = card_of(text, max_tokens=10)
    check_size(640, text, card, "input")
    with pytest.raises(BadRequest, match="641 characters") as error:
        check_size(641, text, card, "input")
    assert (error.value.param, error.value.code) == ("input", "context_length_exceeded")
