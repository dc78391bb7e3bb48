"""Tool calls found in text, however the text is cut: whole, at every place, and character by character."""

import json
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.serve.calls import FORMATS, CallParser, Piece

Calls = list[tuple[str, str]]


def read(form: str, parts: Iterable[str]) -> tuple[str, Calls]:
    """Content and calls of a text that comes in parts."""
    parser = CallParser(FORMATS[form])
    pieces = [piece for part in parts for piece in parser.push(part)] + parser.flush()
    assert not any(piece == Piece("") for piece in pieces), "an event for nothing"
    content = "".join(piece.text for piece in pieces if piece.call < 0)
    names = [piece.name for piece in pieces if piece.name]
    assert parser.num_calls == len(names)
    said = ["".join(piece.text for piece in pieces if piece.call == number) for number in range(len(names))]
    return content, list(zip(names, said, strict=True))


CITY = '{"city": "Köln \\"}{<tool_call>\\" \\\\", "days": [1, {"a": null}]}'
ONE = f'<tool_call>\n{{"name": "weather", "arguments": {CITY}}}\n</tool_call>'
BARE = f'{{"name": "weather", "parameters": {CITY}}}'
WEATHER = ("weather", CITY)

TEXTS: list[tuple[str, str, str, Calls]] = [
    ("hermes", "Just text, 1 < 2 and <tool> too.  ", "Just text, 1 < 2 and <tool> too.  ", []),
    ("hermes", ONE, "", [WEATHER]),
    ("hermes", f"Let me look.\n\n{ONE}", "Let me look.", [WEATHER]),
    ("hermes", f"{ONE}\n{ONE}\n", "", [WEATHER, WEATHER]),
    ("hermes", f"{ONE}\nThere.", "\nThere.", [WEATHER]),
    ("hermes", f'<tool_call>{{"arguments":{CITY},"name":"weather"}}</tool_call>', "", [WEATHER]),
    ("hermes", '<tool_call>{"name": "now"}</tool_call>', "", [("now", "{}")]),
    ("hermes", '<tool_call>{"name": "now", "arguments": null}</tool_call>', "", [("now", "{}")]),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("f", '{"a": 1}')]),
    ("hermes", '<tool_call>{"id": [1, "x"], "name": "f", "arguments": {}}</tool_call>', "", [("f", "{}")]),
    ("hermes", f"{ONE.removesuffix('</tool_call>')}{ONE}", "", [WEATHER, WEATHER]),  # an end that was forgotten
    ("hermes", "<tool_call>none</tool_call>", "<tool_call>none</tool_call>", []),
    ("hermes", '<tool_call>{"nome": "f"}</tool_call>', '<tool_call>{"nome": "f"}</tool_call>', []),
    ("hermes", '<tool_call>{"name": 3, "arguments": {}}', '<tool_call>{"name": 3, "arguments": {}}', []),
    ("hermes", "<tool_call>{f()}</tool_call>", "<tool_call>{f()}</tool_call>", []),
    ("hermes", '<tool_call>{"name": "f', '<tool_call>{"name": "f', []),  # cut off by max_tokens
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "b', "", [("f", '{"a": "b')]),
    ("hermes", "ends <tool_ca", "ends <tool_ca", []),
    ("llama3", "Just text {with braces}.", "Just text {with braces}.", []),
    ("llama3", BARE, "", [WEATHER]),
    ("llama3", f"<|python_tag|>{BARE}", "", [WEATHER]),
    ("llama3", f"\n<|python_tag|> {BARE}; {BARE}", "", [WEATHER, WEATHER]),
    ("llama3", f"{BARE}\n{BARE}", "", [WEATHER, WEATHER]),
    ("llama3", BARE.replace("parameters", "arguments"), "", [WEATHER]),
    ("llama3", '{"name": "Ada", "age": 36}', '{"name": "Ada", "age": 36}', []),  # JSON that is an answer
    ("llama3", '{"answer": {"name": "f", "parameters": {}}}', '{"answer": {"name": "f", "parameters": {}}}', []),
    ("llama3", "<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
    ("llama3", f"Look: {BARE}", f"Look: {BARE}", []),
    ("llama3", f"{BARE} And more.", " And more.", [WEATHER]),
    ("llama3", "", "", []),
    ("llama3", "  \n", "  \n", []),
]


@pytest.mark.parametrize(("form", "text", "content", "calls"), TEXTS, ids=[text[:40] for _, text, _, _ in TEXTS])
def test_wherever_the_text_is_cut(form: str, text: str, content: str, calls: Calls) -> None:
    assert read(form, [text]) == (content, calls)
    assert read(form, text) == (content, calls)  # character by character
    for at in range(len(text)):
        assert read(form, (text[:at], text[at:])) == (content, calls), f"cut at {at}"


def test_arguments_come_as_they_are_written() -> None:
    """The name first, and then no character of the arguments later than it is there."""
    parser = CallParser(FORMATS["hermes"])
    before, _, after = ONE.partition(CITY)
    assert [piece for char in before for piece in parser.push(char)] == []
    for number, char in enumerate(CITY):
        pieces = parser.push(char)
        expected = [Piece("", 0, "weather")] if number == 0 else []
        assert pieces == [*expected, Piece(char, 0)]
    assert [piece for char in after for piece in parser.push(char)] == []
    assert parser.flush() == []


def test_text_is_not_held_back_longer_than_needed() -> None:
    parser = CallParser(FORMATS["hermes"])
    assert parser.push("a <") == [Piece("a")]
    assert parser.push("b") == [Piece(" <b")]
    assert CallParser(FORMATS["llama3"]).push("H") == [Piece("H")]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(st.dictionaries(st.text(), JSON), st.booleans(), st.data())
def test_any_json_survives(arguments: dict[str, Any], ascii: bool, data: st.DataObject) -> None:
    said = json.dumps(arguments, ensure_ascii=ascii)
    text = f'Well.<tool_call>{{"name": "f", "arguments": {said}}}</tool_call>'
    cut = data.draw(st.integers(0, len(text)))
    content, [(name, found)] = read("hermes", (text[:cut], text[cut:]))
    assert (content, name, json.loads(found)) == ("Well.", "f", arguments)


@given(st.text(alphabet='<tool_cal>/{}":nme,;[]\\ \n', max_size=60), st.sampled_from(sorted(FORMATS)))
def test_no_text_breaks_it(text: str, form: str) -> None:
    """And the same is found in it however it is cut; without a call, it is content unchanged."""
    content, calls = read(form, [text])
    assert read(form, text) == (content, calls)
    assert calls or content == text
