"""Tools in requests: what is refused, what a model is told, what holds it to a call, and what clients see of one."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from serve_doubles import TEMPLATE, FakeFrontend, Live, serving, write_checkpoint

from diptych.config import DEMO
from diptych.engine.grammar import Grammars
from diptych.policy.messages import Reason
from diptych.serve.api import Settings
from diptych.serve.calls import FORMATS
from diptych.serve.frontend import Chunk, Job
from diptych.serve.openai import parse
from diptych.serve.template import ChatTemplate
from diptych.serve.text import Text
from diptych.serve.tools import format_of, grammar_of_calls

CITY = {"type": "object", "properties": {"city": {"$ref": "#/$defs/City"}}, "required": ["city"]}
PARAMETERS = CITY | {"$defs": {"City": {"type": "string"}}}
WEATHER: Any = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
NOW: Any = {"type": "function", "function": {"name": "now"}}
HELLO: list[Any] = [{"role": "user", "content": "hello"}]
NAMED: Any = {"type": "function", "function": {"name": "weather"}}
ARGUMENTS = '{"city": "Köln 🦊"}'
ONE = f'<tool_call>\n{{"name": "weather", "arguments": {ARGUMENTS}}}\n</tool_call>'


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    return Text.load(write_checkpoint(tmp_path_factory.mktemp("checkpoint")))


def writing(text: Text, said: str) -> Callable[[Job], Iterator[Chunk]]:
    """A model that writes this, a token at a time: every byte of other characters comes alone."""

    def answer(job: Job) -> Iterator[Chunk]:
        for token in text.encode(said, add_special=False):
            yield Chunk([token])
        yield Chunk([], Reason.STOP)

    return answer


@pytest.fixture(scope="module")
def live(text: Text) -> Iterator[Live]:
    with serving(text, FakeFrontend()) as live:
        yield live


@pytest.fixture
def client(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="-", max_retries=0) as client:
        yield client


# --- what clients see ------------------------------------------------------------------------------------------


def test_a_call(client: openai.OpenAI, live: Live, text: Text) -> None:
    live.frontend.answer = writing(text, f"Let me look.\n{ONE}\n{ONE}")
    got = client.chat.completions.create(model="tiny", messages=HELLO, tools=[WEATHER])
    (choice,) = got.choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Let me look.")
    calls = choice.message.tool_calls or []
    assert [(call.type, call.function.name, call.function.arguments) for call in calls] == [
        ("function", "weather", ARGUMENTS)
    ] * 2
    assert len({call.id for call in calls}) == 2 and all(call.id.startswith("call_") for call in calls)


def test_a_call_streamed(client: openai.OpenAI, live: Live, text: Text) -> None:
    live.frontend.answer = writing(text, f"Look.{ONE}{ONE}")
    chunks = list(client.chat.completions.create(model="tiny", messages=HELLO, tools=[WEATHER], stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Look."
    deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    for index in (0, 1):
        first, *rest = [delta for delta in deltas if delta.index == index]
        assert first.id and first.type == "function" and first.function and first.function.name == "weather"
        assert all(delta.id is None and delta.function and delta.function.name is None for delta in rest)
        assert len(rest) > 3, "in pieces, as it is written"
        assert "".join(delta.function.arguments for delta in (first, *rest)) == ARGUMENTS
    assert [delta.index for delta in deltas] == sorted(delta.index for delta in deltas)
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == ["tool_calls"]


def test_only_a_call_has_no_content(client: openai.OpenAI, live: Live, text: Text) -> None:
    live.frontend.answer = writing(text, ONE)
    got = client.chat.completions.create(model="tiny", messages=HELLO, tools=[WEATHER])
    assert got.choices[0].message.content is None


@pytest.mark.parametrize("fields", [{}, {"tools": [WEATHER], "tool_choice": "none"}], ids=["no tools", "none"])
def test_where_no_call_is_asked_for_none_is_found(
    client: openai.OpenAI, live: Live, text: Text, fields: dict[str, Any]
) -> None:
    live.frontend.answer = writing(text, ONE)
    got = client.chat.completions.create(model="tiny", messages=HELLO, **fields)
    assert (got.choices[0].message.content, got.choices[0].finish_reason) == (ONE, "stop")
    assert got.choices[0].message.tool_calls is None


def test_a_call_cut_off_says_so(client: openai.OpenAI, live: Live, text: Text) -> None:
    tokens = text.encode(ONE, add_special=False)[:-20]
    live.frontend.answer = lambda job: [Chunk(tokens, Reason.LENGTH)]
    got = client.chat.completions.create(model="tiny", messages=HELLO, tools=[WEATHER])
    assert got.choices[0].finish_reason == "length"


def test_log_probabilities_stay_complete(live: Live, text: Text) -> None:
    """Every token has its entry, although most events of a call are not a token each."""
    from serve_doubles import score_of

    tokens = text.encode(f"Look.{ONE}", add_special=False)
    live.frontend.answer = lambda job: [
        *(Chunk([token], scores=(score_of(token, 0),)) for token in tokens),
        Chunk([], Reason.STOP),
    ]
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="-") as client:
        stream = client.chat.completions.create(
            model="tiny", messages=HELLO, tools=[WEATHER], stream=True, logprobs=True
        )
        entries = [e for c in stream if c.choices[0].logprobs for e in c.choices[0].logprobs.content or []]
    assert b"".join(bytes(entry.bytes or ()) for entry in entries).decode() == f"Look.{ONE}"


# --- what is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "search"}]},
        {"tools": [{"type": "function"}]},
        {"tools": [{"type": "function", "function": {"name": "a b"}}]},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": "none"}}]},
        {"tools": [NOW] * 129},
        {"tools": [NOW], "tool_choice": NAMED},
        {"tools": [NOW], "tool_choice": "always"},
        {"tool_choice": "required"},
        {"tools": [WEATHER], "tool_choice": {"type": "function"}},
        {"tools": [WEATHER], "tool_choice": "required"},  # this server's workers know no grammars
        {"tools": [WEATHER], "tool_choice": NAMED},
    ],
    ids=lambda fields: str(fields)[:50],
)
def test_what_is_refused(client: openai.OpenAI, live: Live, fields: dict[str, Any]) -> None:
    before = len(live.frontend.jobs)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=HELLO, **fields)
    assert (caught.value.param or "").startswith("tool")
    assert len(live.frontend.jobs) == before


def test_without_a_format_calls_stay_text(text: Text) -> None:
    settings = Settings(tool_parser="none")
    with serving(text, FakeFrontend(writing(text, ONE)), settings) as live:
        client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="-")
        got = client.chat.completions.create(model="tiny", messages=HELLO, tools=[WEATHER])
        assert got.choices[0].message.content == ONE
        with pytest.raises(openai.BadRequestError, match="--tool-parser"):
            client.chat.completions.create(model="tiny", messages=HELLO, tools=[WEATHER], tool_choice="required")


# --- what the model is told ------------------------------------------------------------------------------------


def test_calls_and_results_go_through_the_template() -> None:
    """Arguments arrive there as objects, as templates expect; OpenAI's clients send them as strings."""
    template = ChatTemplate(
        "{% for m in messages %}{{ m.role }}:{{ m.content }}{% for c in m.tool_calls or [] %}"
        "{{ c.function.name }}({{ c.function.arguments.city }}){% endfor %};{% endfor %}{{ tools | length }}"
    )
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Köln"}'}}
    messages = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "rain"},
    ]
    assert template.render(messages, [WEATHER]) == "assistant:weather(Köln);tool:rain;1"


def test_none_hides_the_tools(client: openai.OpenAI, live: Live, text: Text) -> None:
    live.frontend.answer = writing(text, "hi")
    seen = ChatTemplate("{{ tools | length if tools else 'no' }} tools")
    text.chat, before = seen, text.chat
    try:
        for choice, expected in (("auto", "1 tools"), ("none", "no tools")):
            client.chat.completions.create(model="tiny", messages=HELLO, tools=[NOW], tool_choice=choice)  # type: ignore[arg-type]
            assert text.decode(live.frontend.jobs[-1].tokens) == expected
    finally:
        text.chat = before


@pytest.mark.parametrize("calls", ["f()", [{"id": "1"}], [{"function": {"name": "f", "arguments": "[1]"}}]], ids=str)
def test_calls_that_are_none_are_refused(client: openai.OpenAI, calls: Any) -> None:
    message: Any = {"role": "assistant", "content": None, "tool_calls": calls}
    with pytest.raises(openai.BadRequestError, match="tool_calls"):
        client.chat.completions.create(model="tiny", messages=[*HELLO, message])


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ('<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>', "hermes"),
        ('Respond in the format {"name": function name, "parameters": dictionary}. <|python_tag|>', "llama3"),
        ('{"name": function name, "parameters": dictionary of argument name and its value}', "llama3"),
        ("<tool_call><function=f><parameter=a>", None),
        ("[TOOL_CALLS]", None),
        (TEMPLATE, "hermes"),
    ],
    ids=str,
)
def test_the_format_is_that_of_the_template(text: Text, source: str, name: str | None) -> None:
    found = format_of(Text(text.tokenizer, ChatTemplate("{{ " + repr(source) + " }}")))
    assert found is (FORMATS[name] if name else None)
    assert format_of(text, "none") is None
    assert format_of(text, "llama3") is FORMATS["llama3"]


# --- what holds it to a call -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo() -> tuple[Text, Grammars]:
    pytest.importorskip("llguidance")
    text = Text.load(DEMO)
    return text, Grammars(DEMO, text.vocab_size, text.stop_ids)


def accepts(demo: tuple[Text, Grammars], grammar: str, said: str) -> bool:
    """The whole of a text keeps to a grammar."""
    text, grammars = demo
    tokens, matcher = text.encode(said, add_special=False), grammars.matcher(grammar)
    whole = all(matcher.allowed(tokens[:at])[token] for at, token in enumerate(tokens))
    return whole and bool(np.any(matcher.allowed(tokens)[list(text.stop_ids)]))


def grammar(demo: tuple[Text, Grammars], form: str, **fields: Any) -> str:
    from llguidance import LLMatcher

    call = parse(json.dumps({"messages": HELLO, "tools": [WEATHER, NOW], **fields}).encode(), chat=True)
    made = grammar_of_calls(call, FORMATS[form], demo[0])
    return LLMatcher.grammar_from_lark(made) if made else ""


@pytest.mark.parametrize("form", sorted(FORMATS))
def test_required_is_any_call_and_named_is_that_one(demo: tuple[Text, Grammars], form: str) -> None:
    here = FORMATS[form]

    def written(name: str, arguments: str) -> str:
        said = f'{{"name": "{name}", "{here.key}": {arguments}}}'
        return f"{here.open}\n{said}\n{here.close}" if here.open else said

    weather, now = written("weather", '{"city": "K"}'), written("now", "{}")
    between = "\n" if here.open else "; "
    required = grammar(demo, form, tool_choice="required")
    single = grammar(demo, form, tool_choice="required", parallel_tool_calls=False)
    named = grammar(demo, form, tool_choice=NAMED)
    assert [accepts(demo, required, said) for said in (weather, now, weather + between + now)] == [True] * 3
    assert [accepts(demo, single, said) for said in (weather, now, weather + between + now)] == [True, True, False]
    assert [accepts(demo, named, said) for said in (weather, now)] == [True, False]
    for wrong in ("hello", written("weather", "{}"), written("weather", '{"city": 3}'), written("other", "{}")):
        assert not accepts(demo, required, wrong)
    assert grammar(demo, form, tool_choice="auto") == ""


def test_one_grammar_at_a_time(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(
            model="tiny", messages=HELLO, tools=[NOW], tool_choice="required", response_format={"type": "json_object"}
        )


def test_a_marker_that_is_a_special_token_is_text_all_the_same(tmp_path: Path) -> None:
    shutil.copytree(DEMO, tmp_path / "m")
    path = tmp_path / "m" / "tokenizer.json"
    data = json.loads(path.read_text())
    number = max(token["id"] for token in data["added_tokens"]) + 10_000
    for at, name in enumerate(("<tool_call>", "</tool_call>")):
        like = data["added_tokens"][0]
        data["added_tokens"].append({**like, "id": number + at, "content": name, "special": True})
    path.write_text(json.dumps(data))
    text = Text.load(tmp_path / "m")
    opening = text.id_of("<tool_call>")
    assert opening in text.special_ids
    said = [opening, *text.encode('{"name": "now", "arguments": {}}', add_special=False), text.id_of("</tool_call>")]
    model = FakeFrontend(lambda job: [Chunk(said, Reason.STOP)])
    with serving(text, model) as live, openai.OpenAI(base_url=f"{live.url}/v1", api_key="-") as client:
        got = client.chat.completions.create(model="tiny", messages=HELLO, tools=[NOW])
    assert got.choices[0].finish_reason == "tool_calls"
    call = parse(json.dumps({"messages": HELLO, "tools": [NOW], "tool_choice": "required"}).encode(), chat=True)
    assert '\ncall: <tool_call> "\\n" one' in grammar_of_calls(call, FORMATS["hermes"], text)
