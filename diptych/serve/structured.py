"""What an answer is asked to be (a JSON schema, a regular expression, a grammar, one of several texts), as a grammar.

Speaks OpenAI's `response_format` and vLLM's `structured_outputs` and `guided_*`. What cannot be a grammar is refused
before anything is submitted. Not responsible for holding answers to it (`engine/grammar.py`).
"""

import re
from functools import lru_cache
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
"""The field that said it, its kind (json, regex, choice, grammar, lark), and what it said."""


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
        raise _too_large(param)
    wrong = LLMatcher.validate_grammar(grammar, None, limits=limits())
    if not wrong and kind != "lark":  # that of calls has special tokens, and is ours
        wrong = _dead(LLMatcher, grammar)
    if wrong:
        raise BadRequest(f"'{param}': {wrong.strip()}", param)
    return grammar


def _too_large(param: str) -> BadRequest:
    return BadRequest(f"'{param}' makes a grammar of more than {MAX_BYTES} bytes", param)


def _dead(matcher: Any, grammar: str) -> str:
    """Why nothing can be written that is in a grammar, seen from its first byte; "" where something can."""
    begun = matcher(_bytes(), grammar, limits=limits())
    begun.compute_bitmask()
    if begun.is_error() or (begun.is_stopped() and not begun.is_accepting()):
        return begun.get_error().partition("\n")[0] or "nothing can be written that is in this grammar"
    return ""


@lru_cache(maxsize=1)
def _bytes() -> Any:
    """A tokenizer whose tokens are bytes: whatever a model's are, they are made of these."""
    from llguidance import LLTokenizer

    return LLTokenizer("byte")


def _wishes(call: Call) -> list[Wish]:
    found: list[Wish] = []
    if call.response_format is not None:
        found += _of_format(call.response_format)
    for kind, wish in (call.structured_outputs or {}).items():
        if kind == "json_object" and isinstance(wish, bool):
            found += [(f"structured_outputs.{kind}", "json", {"type": "object"})] if wish else []
        elif wish is not None:
            found.append((f"structured_outputs.{kind}", kind, wish))
    guided = {
        "json": call.guided_json,
        "regex": call.guided_regex,
        "choice": call.guided_choice,
        "grammar": call.guided_grammar,
    }
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
        case "grammar", str() if wish.strip():
            return matcher.grammar_from_lark(_lark(param, wish))
        case "regex", str():
            return matcher.grammar_from_regex(wish)
        case "choice", [*texts] if texts and all(isinstance(text, str) and text for text in texts):
            return matcher.grammar_from_regex("|".join(map(_literal, texts)))
    raise BadRequest(f"'{param}' is not a json schema, a regex, a grammar or a choice of non-empty texts", param)


def _lark(param: str, grammar: str) -> str:
    """A grammar in llguidance's Lark; it may be one in GBNF, as llama.cpp has it."""
    from llguidance.gbnf_to_lark import any_to_lark

    if len(grammar) > MAX_BYTES:
        raise _too_large(param)
    try:
        return str(any_to_lark(grammar))
    except Exception as error:  # it has no class of errors: what it cannot read is what the client sent
        raise BadRequest(f"'{param}' is neither Lark nor GBNF: {error}", param) from error


def _literal(text: str) -> str:
    """A regular expression for exactly this text."""
    return re.sub(r"[^\w\s]", lambda found: f"\\x{{{ord(found[0]):x}}}", text)
