"""How a chat becomes a prompt: what its body says of its template, and of where the prompt ends.

The same in `/v1/chat/completions` and `/tokenize`. Not responsible for the template itself (`template.py`).
"""

from typing import Any, Protocol

from diptych.errors import BadRequest
from diptych.serve.text import Text


class Chat(Protocol):
    """What the bodies of both have in common. None is "not given"."""

    messages: list[dict[str, Any]] | None
    chat_template_kwargs: dict[str, Any] | None
    reasoning_effort: str | None  # a variable of the template, as vLLM has it
    add_generation_prompt: bool | None
    continue_final_message: bool | None
    add_special_tokens: bool | None


def check_turn(call: Chat) -> None:
    """A prompt ends with a cue for the model's turn, or within the last message, or where that ends: one of these."""
    if call.continue_final_message and call.add_generation_prompt:
        what = "'continue_final_message' goes on with the last message; 'add_generation_prompt' begins another"
        raise BadRequest(what, "continue_final_message")
    for name in ("add_generation_prompt", "continue_final_message"):
        if not call.messages and getattr(call, name):
            raise BadRequest(f"'{name}' is for chats", name)


def encode_chat(call: Chat, tools: list[dict[str, Any]] | None, text: Text) -> list[int]:
    """The token ids of a chat; raises `BadRequest`."""
    assert call.messages is not None
    extra = dict(call.chat_template_kwargs or {})
    if call.reasoning_effort is not None:
        extra.setdefault("reasoning_effort", call.reasoning_effort)
    return text.encode_chat(
        call.messages,
        tools,
        extra,
        special=call.add_special_tokens is True,
        cue=call.add_generation_prompt is not False,
        go_on=call.continue_final_message is True,
    )
