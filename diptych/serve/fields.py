"""Fields of a body that nobody here reads: those that would change the answer are refused, the others passed over.

OpenAI's servers ignore what they do not know, and so do we; but a field that other servers take at its word, and that
is not supported here, must not be lost silently. Not responsible for the fields that are read (`openai.py` and others
have structs of them).
"""

import logging
from functools import lru_cache
from typing import Any

import msgspec

from diptych.errors import BadRequest

log = logging.getLogger(__name__)

# What OpenAI's API, vLLM or SGLang know and we do not do, with the values that ask for nothing (null never does).
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "bad_words": ([],),
    "chat_template": (),
    "documents": ([],),
    "ebnf": ("",),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guided_whitespace_pattern": (),
    "json_schema": ("",),
    "logits_processors": ([],),
    "lora_path": (),
    "mm_processor_kwargs": ({},),
    "modalities": ([], ["text"]),
    "prompt_embeds": ([],),
    "prompt_logprobs": (False,),
    "regex": ("",),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "stop_regex": ("", []),
    "structural_tag": (),
    "suffix": ("",),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "web_search_options": (),
}
_INSTEAD = {
    "chat_template": "the checkpoint's own is used; 'chat_template_kwargs' are passed to it",
    "ebnf": "use 'guided_grammar'",
    "function_call": "use 'tool_choice'",
    "functions": "use 'tools'",
    "json_schema": "use 'response_format'",
    "prompt_logprobs": "ask for 'echo' with 'logprobs'",
    "regex": "use 'guided_regex'",
    "truncate_prompt_tokens": "cut the text yourself",
}
"""What to do about it, where there is something."""

QUIET = frozenset((
    "early_stopping", "guided_decoding_backend", "include_reasoning", "kv_transfer_params", "length_penalty",
    "metadata", "prediction", "prompt_cache_key", "prompt_cache_retention", "request_id", "safety_identifier",
    "service_tier", "spaces_between_special_tokens", "store", "user",
))  # fmt: skip
"""What changes no answer here, and is not worth a line in the log."""

MAX_NAMED = 64  # unknown fields that are named in the log, of one process

_OBJECT = msgspec.json.Decoder(dict[str, msgspec.Raw])
_named: set[str] = set()


def check(body: bytes, kind: type) -> None:
    """Look through a body that was decoded as `kind` (a struct) for fields that it lacks; raises `BadRequest`."""
    known = _known(kind)
    try:
        rest = {name: raw for name, raw in _OBJECT.decode(body).items() if name not in known and name not in QUIET}
        asked = {name: msgspec.json.decode(raw) for name, raw in rest.items() if name in UNSUPPORTED}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:  # what was passed over was not read
        raise BadRequest(f"the request body is not valid JSON: {error}") from error
    for name, value in asked.items():
        _refuse(name, value)
    for name in rest:
        if name not in asked:
            _name(name)


def _refuse(name: str, value: Any) -> None:
    if value is None or any(value == ours and type(value) is type(ours) for ours in UNSUPPORTED[name]):
        return
    shown = msgspec.json.encode(value).decode()
    said = shown if len(shown) <= 40 else "this"
    instead = f"; {_INSTEAD[name]}" if name in _INSTEAD else ""
    raise BadRequest(f"'{name}': {said} is not supported{instead}", name, "unsupported_parameter")


def _name(name: str) -> None:
    """Say once that a field is ignored: its name, and nothing of what it holds."""
    name = name[:64]
    if name not in _named and len(_named) < MAX_NAMED:
        _named.add(name)
        log.info("requests have a field %r; nobody here knows it, and it is ignored", name)


@lru_cache(maxsize=16)
def _known(kind: type) -> frozenset[str]:
    return frozenset(field.encode_name for field in msgspec.structs.fields(kind))
