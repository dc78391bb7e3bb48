"""`/tokenize` and `/detokenize`, in vLLM's shapes. Not responsible for HTTP (`api.py`), nor for tokens (`text.py`)."""

from typing import Any

import msgspec

from diptych.errors import BadRequest
from diptych.serve import fields
from diptych.serve.chat import check_turn, encode_chat
from diptych.serve.frontend import ModelCard
from diptych.serve.openai import check_model, check_prompt, decoded
from diptych.serve.text import Text


class TokenizeCall(msgspec.Struct, kw_only=True):
    """The body of `/tokenize`: a `prompt`, or the `messages` of a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeCall(msgspec.Struct, kw_only=True):
    """The body of `/detokenize`."""

    tokens: list[int]
    model: str | None = None


class Tokenized(msgspec.Struct, frozen=True):
    """What `/tokenize` answers."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(msgspec.Struct, frozen=True):
    """What `/detokenize` answers."""

    prompt: str


_TOKENIZE = msgspec.json.Decoder(TokenizeCall)
_DETOKENIZE = msgspec.json.Decoder(DetokenizeCall)


def tokenize(body: bytes, text: Text, card: ModelCard) -> Tokenized:
    """The token ids of a text or a chat; raises `BadRequest`."""
    call = decoded(_TOKENIZE, body)
    fields.check(body, TokenizeCall)
    check_turn(call)
    check_model(call.model, card)
    if (call.prompt is None) == (call.messages is None):
        raise BadRequest("give either 'prompt' or 'messages'", "prompt")
    if call.messages is None:
        ids = text.encode(call.prompt or "", call.add_special_tokens is not False)
    else:
        ids = encode_chat(call, call.tools, text)
    names = [text.tokenizer.id_to_token(i) or "" for i in ids] if call.return_token_strs else None
    return Tokenized(len(ids), card.max_tokens, ids, names)


def detokenize(body: bytes, text: Text, card: ModelCard) -> Detokenized:
    """The text of token ids, special tokens by name; raises `BadRequest`."""
    call = decoded(_DETOKENIZE, body)
    check_model(call.model, card)
    if not call.tokens:
        return Detokenized("")
    check_prompt(call.tokens, card, "tokens")
    return Detokenized(text.tokenizer.decode(call.tokens, skip_special_tokens=False))
