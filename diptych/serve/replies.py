"""The bytes of OpenAI's replies and server-sent events. Not responsible for what they say (`exchange.py`), or errors.

`return_token_ids`, `continuous_usage_stats` and `stop_reason` are vLLM's, and look as they do there.
"""

import uuid
from collections.abc import Sequence
from typing import Any

import msgspec

from diptych.serve.calls import Piece

DONE = b"data: [DONE]\n\n"

_encode = msgspec.json.encode


class Detail(msgspec.Struct, frozen=True):
    """What a choice says beside its text, where it was asked for."""

    logprobs: Any = None
    token_ids: list[int] | None = None
    prompt_ids: list[int] | None = None
    usage: dict[str, Any] | None = None


PLAIN = Detail()


def usage(num_prompt: int, num_written: int, num_cached: int) -> dict[str, Any]:
    """The `usage` object."""
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_written,
        "total_tokens": num_prompt + num_written,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }


def message(pieces: Sequence[Piece]) -> dict[str, Any]:
    """What a chat's answer says: its content (null where there are only calls), and its calls."""
    content = "".join(piece.text for piece in pieces if piece.call < 0)
    calls: list[dict[str, Any]] = []
    for piece in pieces:
        if piece.name:
            calls.append(_call(piece.name))
        if piece.call >= 0:
            calls[piece.call]["function"]["arguments"] += piece.text
    said: dict[str, Any] = {"role": "assistant", "content": None if calls and not content else content}
    return {"message": said | ({"tool_calls": calls} if calls else {})}


def _call(name: str) -> dict[str, Any]:
    """A call that begins."""
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": {"name": name, "arguments": ""}}


def _delta(piece: Piece) -> dict[str, Any]:
    """What a piece adds to a chat's answer."""
    if piece.call < 0:
        return {"content": piece.text}
    known = _call(piece.name) if piece.name else {"function": {"arguments": piece.text}}
    return {"tool_calls": [{"index": piece.call, **known}]}


def choice(
    said: dict[str, Any], index: int, finish: str, detail: Detail = PLAIN, stop_reason: str | int | None = None
) -> dict[str, Any]:
    """One finished answer of a reply that is not streamed; `said`: its `message` or `text`."""
    chat = "message" in said
    ids: dict[str, Any] = {} if detail.token_ids is None else {"token_ids": detail.token_ids}
    if detail.prompt_ids is not None and not chat:  # a chat has one prompt, and says it once, beside the choices
        ids["prompt_token_ids"] = detail.prompt_ids
    ended = {"finish_reason": finish, "stop_reason": stop_reason}
    return {"index": index, **said, "logprobs": detail.logprobs, **ended, **ids}


def reply(head: dict[str, Any], choices: list[dict[str, Any]], used: dict[str, Any], **extra: Any) -> bytes:
    """The body of a reply that is not streamed; of `extra` what is not None."""
    given = {name: value for name, value in extra.items() if value is not None}
    return _encode({**head, "choices": choices, "usage": used, **given})


def head(chat: bool, streamed: bool, ident: str, created: int, model: str) -> dict[str, Any]:
    """What every body or event of one reply begins with."""
    kind = ("chat.completion.chunk" if streamed else "chat.completion") if chat else "text_completion"
    return {"id": ident, "object": kind, "created": created, "model": model}


class Frames:
    """The server-sent events of one choice, everything but the text encoded once."""

    __slots__ = ("_after", "_before", "_chat", "_close", "_open", "_said")

    def __init__(self, chat: bool, head: dict[str, Any], index: int, with_usage: bool):
        self._chat = chat
        self._open = b"data: " + _encode(head)[:-1] + b',"choices":[{"index":%d,' % index
        self._close = b',"usage":null}\n\n' if with_usage else b"}\n\n"
        self._said = (b'"delta":{"content":', b"}") if chat else (b'"text":', b"")
        self._before = self._open + self._said[0]
        self._after = self._said[1] + b',"logprobs":null,"finish_reason":null}]' + self._close

    def first(self, detail: Detail = PLAIN) -> bytes:
        """The event before any text: chat says who speaks."""
        if not self._chat:
            return b""
        return self._event(b'"delta":{"role":"assistant","content":""}', b"null", detail)

    def text(self, text: str, detail: Detail = PLAIN) -> bytes:
        """More of the answer."""
        if detail is PLAIN:  # as almost always: everything around the text is known
            return b"".join((self._before, _encode(text), self._after))
        return self._event(_encode(text).join(self._said), b"null", detail)

    def pieces(self, pieces: Sequence[Piece], detail: Detail = PLAIN) -> bytes:
        """More of an answer in which calls are looked for: an event each, the first with the details."""
        if not pieces:
            return b"" if detail is PLAIN else self._event(b'"delta":{}', b"null", detail)
        said = (b'"delta":' + _encode(_delta(piece)) for piece in pieces)
        return b"".join(self._event(part, b"null", PLAIN if at else detail) for at, part in enumerate(said))

    def last(self, finish: str, detail: Detail = PLAIN, stop_reason: str | int | None = None) -> bytes:
        """The end of the answer."""
        said = b'"delta":{}' if self._chat else b'"text":""'
        return self._event(said, b'"' + finish.encode() + b'","stop_reason":' + _encode(stop_reason), detail)

    def _event(self, said: bytes, finish: bytes, detail: Detail) -> bytes:
        scored = b"null" if detail.logprobs is None else _encode(detail.logprobs)
        extra = b""
        inside = b"" if detail.token_ids is None else b',"token_ids":' + _encode(detail.token_ids)
        if detail.prompt_ids is not None:
            ids = b',"prompt_token_ids":' + _encode(detail.prompt_ids)
            inside, extra = (inside, ids) if self._chat else (inside + ids, b"")
        close = self._close if detail.usage is None else b',"usage":' + _encode(detail.usage) + b"}\n\n"
        parts = (self._open, said, b',"logprobs":', scored, b',"finish_reason":', finish, inside, b"}]", extra, close)
        return b"".join(parts)


def last_frame(head: dict[str, Any], used: dict[str, Any] | None, trace: dict[str, Any] | None) -> bytes:
    """The event after all choices: with `usage` where `include_usage` was asked for, and where the time went."""
    traced = {} if trace is None else {"diptych": trace}
    return b"data: " + _encode({**head, "choices": [], "usage": used, **traced}) + b"\n\n"
