"""What requests ask an answer to be: what becomes a grammar, and what is refused."""

import json
from dataclasses import replace
from typing import Any

import pytest

from diptych.errors import BadRequest
from diptych.serve import openai
from diptych.serve.frontend import ModelCard
from diptych.serve.structured import grammar_of

PLAIN = ModelCard("tiny", max_tokens=100, vocab_size=50, block_size=16)
CARD = replace(PLAIN, structured=True)
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def grammar(card: ModelCard = CARD, **fields: Any) -> str:
    return grammar_of(openai.parse(json.dumps({"prompt": "hi", **fields}).encode(), chat=False), card)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"response_format": {"type": "text"}},
        {"structured_outputs": {"json": None}},
        {"structured_outputs": {"json_object": False}},
    ],
)
def test_nothing_is_asked(fields: dict[str, Any]) -> None:
    assert grammar(PLAIN, **fields) == ""


ASKED: list[dict[str, Any]] = [
    {"response_format": {"type": "json_object"}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": SCHEMA}}},
    {"structured_outputs": {"json": SCHEMA}},
    {"structured_outputs": {"regex": "[a-z]+"}},
    {"guided_json": json.dumps(SCHEMA)},
    {"guided_regex": "(yes|no)"},
    {"guided_grammar": 'start: "yes" | "no"'},
    {"structured_outputs": {"grammar": 'root ::= "yes" | [0-9]+'}},
    {"structured_outputs": {"json_object": True}},
    {"guided_choice": ["yes", 'no (or "maybe")', "né 🦊 \\ a|b"]},
]


@pytest.mark.parametrize("fields", ASKED, ids=str)
def test_it_becomes_a_grammar(fields: dict[str, Any]) -> None:
    pytest.importorskip("llguidance")
    assert grammar(**fields)


@pytest.mark.parametrize("fields", ASKED, ids=str)
def test_a_server_that_cannot_says_so(fields: dict[str, Any]) -> None:
    with pytest.raises(BadRequest) as caught:
        grammar(PLAIN, **fields)
    assert caught.value.code == "unsupported_parameter"
    assert (caught.value.param or "").startswith(next(iter(fields)))


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "xml"}},
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}},
        {"guided_json": "{"},
        {"guided_regex": "(a"},
        {"guided_choice": []},
        {"guided_choice": [""]},
        {"guided_json": {"$ref": "#"}},
        {"guided_grammar": ""},
        {"guided_grammar": "start: start"},
        {"guided_grammar": "start: <|im_end|>"},
        {"guided_grammar": "root ::= (("},
        {"guided_grammar": 'root ::= "a" ' * 10_000},
        {"structured_outputs": {"poem": "a haiku"}},
        {"guided_regex": "a", "guided_choice": ["a"]},
        {"guided_regex": "a" * 70_000},
    ],
    ids=lambda fields: str(fields)[:60],
)
def test_what_is_refused(fields: dict[str, Any]) -> None:
    pytest.importorskip("llguidance")
    with pytest.raises(BadRequest) as caught:
        grammar(**fields)
    assert caught.value.param


def test_a_choice_is_taken_literally() -> None:
    llguidance = pytest.importorskip("llguidance")
    from diptych.engine.grammar import Grammars

    assert llguidance and Grammars
    made = grammar(guided_choice=["a.c"])
    assert "a.c" not in made, "a dot is no wildcard"
