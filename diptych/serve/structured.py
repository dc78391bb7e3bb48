"""What an answer is asked to be (a JSON schema, a regular expression, one of several texts), as a grammar.

Speaks OpenAI's `response_format` and vLLM's `structured_outputs` and `guided_*`. What cannot be a grammar is refused
before anything is submitted. Not responsible for holding answers to it (`engine/grammar.py`).
"""

import re
from typing import Any

import msgspec

from diptych.engine.grammar import limits
from diptych.errors import BadRequest
from diptych.serve.frontend import ModelCard
from diptych.serve.openai import Call

MAX_BYTES = 1 << 16  # of a grammar: a worker compiles it between two steps

# Enough for an indented document; without a bound a model that likes newlines would write them to its last token.
WHITESPACE = r"[ \n]{0,20}"

Wish = tuple[str, str, Any]
"""The field that said it, its kind (json, regex, choice, lark), and what it said."""


def grammar_of(call: Call, card: ModelCard, calls: str = "") -> str:
    """The grammar a request asks for, "" where it asks for none; raises `BadRequest`.

    calls: that of the calls its answer must be, in Lark.
    """
    wishes: list[Wish] = [("tool_choice", "lark", calls)] if calls else []
    wishes += _wishes(call)
    if not wishes:
        return ""
    param, kind, wish = wishes[0]
    if len(wishes) > 1:
        raise BadRequest(f"'{param}' and '{wishes[1][0]}': an answer can be held to one grammar", wishes[1][0])
    if not card.structured:
        why = "structured output needs the torch engine and llguidance (the extra diptych[structured])"
        raise BadRequest(f"'{param}' is not supported here: {why}", param, "unsupported_parameter")
    from llguidance import LLMatcher

    grammar: str = _grammar(LLMatcher, param, kind, wish)
    if len(grammar.encode()) > MAX_BYTES:
        raise BadRequest(f"'{param}' makes a grammar of more than {MAX_BYTES} bytes", param)
    wrong = LLMatcher.validate_grammar(grammar, None, limits=limits())
    if wrong:
        raise BadRequest(f"'{param}': {wrong.strip()}", param)
    return grammar


def _wishes(call: Call) -> list[Wish]:
    found: list[Wish] = []
    if call.response_format is not None:
        found += _of_format(call.response_format)
    for kind, wish in (call.structured_outputs or {}).items():
        if wish is not None:
            found.append((f"structured_outputs.{kind}", kind, wish))
    guided = {"json": call.guided_json, "regex": call.guided_regex, "choice": call.guided_choice}
    return found + [(f"guided_{kind}", kind, wish) for kind, wish in guided.items() if wish is not None]


def _of_format(wanted: dict[str, Any]) -> list[Wish]:
    """OpenAI's `response_format`."""
    match wanted:
        case {"type": "text"}:
            return []
        case {"type": "json_object"}:
            return [("response_format", "json", {"type": "object"})]
        case {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
            return [("response_format", "json", schema)]
    raise BadRequest("'response_format' is text, json_object or json_schema with a schema", "response_format")


def _grammar(matcher: Any, param: str, kind: str, wish: Any) -> Any:
    match kind, wish:
        case "lark", str() if param == "tool_choice":
            return matcher.grammar_from_lark(wish)
        case "json", dict() | str():
            text = wish if isinstance(wish, str) else msgspec.json.encode(wish).decode()
            try:
                return matcher.grammar_from_json_schema(text, defaults={"whitespace_pattern": WHITESPACE})
            except ValueError as error:
                raise BadRequest(f"'{param}': {error}", param) from error
        case "regex", str():
            return matcher.grammar_from_regex(wish)
        case "choice", [*texts] if texts and all(isinstance(text, str) and text for text in texts):
            return matcher.grammar_from_regex("|".join(map(_literal, texts)))
    raise BadRequest(f"'{param}' is not a json schema, a regex or a choice of non-empty texts", param)


def _literal(text: str) -> str:
    """A regular expression for exactly this text."""
    return re.sub(r"[^\w\s]", lambda found: f"\\x{{{ord(found[0]):x}}}", text)
