"""Grammars: what they allow depends on the tokens alone, and answers keep to them in every mode."""

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("llguidance")
torch = pytest.importorskip("torch")

from llguidance import LLMatcher  # noqa: E402

from diptych import LLM  # noqa: E402
from diptych.config import DEMO  # noqa: E402
from diptych.engine.grammar import Grammars  # noqa: E402
from diptych.serve.frontend import ModelCard  # noqa: E402
from diptych.serve.openai import Call  # noqa: E402
from diptych.serve.structured import grammar_of  # noqa: E402
from diptych.serve.text import Text  # noqa: E402

TEXT = Text.load(Path(DEMO))
VOCAB = TEXT.vocab_size
END = TEXT.stop_ids[0]
GRAMMARS = Grammars(Path(DEMO), VOCAB, TEXT.stop_ids)
DIGITS = LLMatcher.grammar_from_regex("[0-9]{3}-[a-c]+x")
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["fox", "dog"]}, "legs": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "legs"],
    "additionalProperties": False,
}


def allowed(written: str) -> set[str]:
    mask = GRAMMARS.matcher(DIGITS).allowed(TEXT.encode(written, add_special=False))
    return {TEXT.token(i) for i in mask.nonzero()[0].tolist()}


def test_what_is_allowed() -> None:
    assert all(re.fullmatch("[0-9]+-?", token) for token in allowed(""))
    assert {"0", "9"} <= allowed("")
    assert "x" not in allowed("123-")
    assert "x" in allowed("123-a")
    assert allowed("123-ax") == {TEXT.token(END)}


def test_replayed_or_step_by_step_is_the_same() -> None:
    ids = TEXT.encode("123-abx", add_special=False)
    going = GRAMMARS.matcher(DIGITS)
    for end in range(len(ids) + 1):
        assert (going.allowed(ids[:end]) == GRAMMARS.matcher(DIGITS).allowed(ids[:end])).all()
    assert (going.allowed(ids[:1]) == GRAMMARS.matcher(DIGITS).allowed(ids[:1])).all(), "and back"


def test_what_left_the_grammar_can_only_end() -> None:
    mask = GRAMMARS.matcher(DIGITS).allowed(TEXT.encode("zzz", add_special=False))
    assert mask.nonzero()[0].tolist() == [END]


@pytest.mark.parametrize("grammar", ["nonsense {", LLMatcher.grammar_from_regex("(a")])
def test_what_is_no_grammar_ends_the_answer_and_not_the_worker(grammar: str) -> None:
    matcher = GRAMMARS.matcher(grammar)
    assert matcher.allowed([]).nonzero()[0].tolist() == [END]
    assert matcher.allowed([5, 6]).nonzero()[0].tolist() == [END]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_keep_to_it_in_every_mode(temperature: float) -> None:
    call = Call(response_format={"type": "json_schema", "json_schema": {"schema": SCHEMA}})
    grammar = grammar_of(call, ModelCard("demo", 1, 1, 1, structured=True))
    outcomes = []
    for flags in ({"mixed": 1, "chunk": "off"}, {"mixed": 1, "chunk": 16}, {"prefill": 1, "decode": 1, "depth": 2}):
        with LLM("demo", kv_memory="16MiB", **flags) as llm:
            prompts = [f"Tell me about animal number {i}." for i in range(4)]
            answers = llm.generate(prompts, max_tokens=200, temperature=temperature, seed=3, grammar=grammar)
            outcomes.append([answer.text for answer in answers])
            assert {answer.reason for answer in answers} == {"stop"}
    assert outcomes[0] == outcomes[1] == outcomes[2]
    for text in outcomes[0]:
        said = json.loads(text)
        assert set(said) == {"name", "legs"}
        assert said["name"] in ("fox", "dog")
        assert 0 <= said["legs"] <= 99


def test_min_tokens_does_not_outlive_the_grammar() -> None:
    """Its end is the answer's, and nothing invisible is written until so many tokens are there."""
    grammar = grammar_of(Call(guided_choice=["yes"]), ModelCard("demo", 1, 1, 1, structured=True))
    with LLM("demo", kv_memory="16MiB", mixed=1) as llm:
        answer = llm.generate("Well?", max_tokens=60, grammar=grammar, min_new=50)
    assert (answer.text, answer.reason) == ("yes", "stop")
    assert len(answer.tokens) < 10
