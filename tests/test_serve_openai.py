"""The dialect: what bodies are taken and refused, what replies and events look like."""

import json
from typing import Any

import msgspec
import pytest

from diptych.errors import BadRequest, NotFound, Overloaded
from diptych.serve import openai, replies
from diptych.serve.frontend import ModelCard

CARD = ModelCard("tiny", max_tokens=100, vocab_size=50, block_size=16, stop_ids=(2,), aliases=("small",))


def completion(**fields: Any) -> openai.Call:
    return openai.parse(json.dumps({"prompt": "hi", **fields}).encode(), chat=False)


def test_defaults_are_openais() -> None:
    call = completion()
    chosen = openai.sampling(call, CARD.stop_ids)
    assert (chosen.temperature, chosen.top_p, chosen.top_k, chosen.min_new) == (1.0, 1.0, 0, 0)
    assert chosen.stop_ids == (2,)
    assert 0 <= chosen.seed < 2**63
    assert chosen.seed != openai.sampling(call, CARD.stop_ids).seed
    assert openai.max_new(call, 10, CARD, chat=False) == 16
    assert openai.max_new(call, 10, CARD, chat=True) == 90
    assert openai.max_new(call, 95, CARD, chat=False) == 5


def test_null_is_not_given() -> None:
    names = [field.name for field in msgspec.structs.fields(openai.Call) if field.name != "prompt"]
    assert completion(**dict.fromkeys(names)) == completion()


def test_parameters_arrive() -> None:
    call = completion(temperature=0, top_p=0.5, top_k=-1, seed=-1, min_tokens=2, stop_token_ids=[9, 2], max_tokens=3)
    chosen = openai.sampling(call, CARD.stop_ids)
    assert (chosen.temperature, chosen.top_p, chosen.top_k, chosen.min_new) == (0.0, 0.5, 0, 2)
    assert chosen.seed == 2**63 - 1
    assert chosen.stop_ids == (2, 9)
    assert openai.sampling(completion(ignore_eos=True, stop_token_ids=[9]), CARD.stop_ids).stop_ids == (9,)
    assert openai.max_new(completion(max_tokens=3, max_completion_tokens=4), 1, CARD, True) == 4


def test_penalties_arrive() -> None:
    given = {"min_p": 0.1, "repetition_penalty": 1.2, "presence_penalty": -1, "frequency_penalty": 0.5}
    chosen = openai.sampling(completion(**given, logit_bias={"7": 2, "3": -100}), ())
    assert {name: getattr(chosen, name) for name in given} == given
    assert chosen.logit_bias == ((3, -100.0), (7, 2.0))
    plain = openai.sampling(completion(), ())
    assert (plain.min_p, plain.repetition_penalty, plain.presence_penalty, plain.frequency_penalty) == (0, 1, 0, 0)
    assert plain.logit_bias == ()


def test_stop_is_a_string_or_a_list() -> None:
    assert openai.stop_strings(completion(stop="a")) == ("a",)
    assert openai.stop_strings(completion(stop=["a", "b"])) == ("a", "b")
    assert openai.stop_strings(completion()) == ()


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("hi", ["hi"]),
        (["hi"], ["hi"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ],
)
def test_prompts_however_written(prompt: Any, expected: Any) -> None:
    assert openai.prompts(completion(prompt=prompt), limit=2) == expected


@pytest.mark.parametrize("prompt", [["a", 1], [1, [2]], ["a", "b", "c"]])
def test_prompts_that_are_refused(prompt: Any) -> None:
    with pytest.raises(BadRequest) as caught:
        openai.prompts(completion(prompt=prompt), limit=2)
    assert caught.value.param == "prompt"


REFUSED: list[tuple[str, Any]] = [
    ("temperature", -0.1),
    ("temperature", 2.1),
    ("temperature", "hot"),
    ("temperature", True),
    ("top_p", 0),
    ("top_p", 1.5),
    ("top_k", -2),
    ("top_k", 1.5),
    ("max_tokens", 0),
    ("max_tokens", -5),
    ("max_tokens", 1e30),
    ("max_tokens", "5"),
    ("max_completion_tokens", 0),
    ("min_tokens", -1),
    ("seed", 2**63),
    ("seed", "x"),
    ("priority", 2**40),
    ("stop", 5),
    ("stop", ""),
    ("stop", ["a", ""]),
    ("stop", ["x"] * 17),
    ("stop", "x" * 1025),
    ("stream", "yes"),
    ("stream_options", {"include_usage": True}),
    ("model", 5),
    ("ignore_eos", 1),
    ("n", 129),
    ("n", 0),
    ("best_of", 0),
    ("best_of", 129),
    ("echo", 1),
    ("suffix", "x"),
    ("logprobs", True),
    ("logprobs", -1),
    ("logprobs", 21),
    ("top_logprobs", 3),
    ("prompt_logprobs", 1),
    ("frequency_penalty", 2.5),
    ("presence_penalty", -2.1),
    ("repetition_penalty", 0),
    ("min_p", -0.1),
    ("min_p", 1.1),
    ("logit_bias", {"word": 1}),
    ("logit_bias", {"5": 101}),
    ("prompt", None),
    ("prompt", ""),
    ("prompt", []),
    ("prompt", 5),
    ("prompt", {}),
]


@pytest.mark.parametrize(("name", "value"), REFUSED, ids=[f"{n}={str(v)[:20]}" for n, v in REFUSED])
def test_what_is_refused_names_the_field(name: str, value: Any) -> None:
    with pytest.raises(BadRequest) as caught:
        completion(**{name: value})
    assert caught.value.param == name
    assert caught.value.status == 400


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 1, "best_of": 1, "echo": False, "suffix": "", "logprobs": False, "top_logprobs": 0},
        {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "tool_choice": "auto"},
        {"response_format": {"type": "text"}, "user": "me", "metadata": {"a": [1]}, "unheard_of": None},
    ],
)
def test_what_changes_nothing_is_let_through(fields: dict[str, Any]) -> None:
    completion(**fields)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"nonsense", b'{"prompt": "a\xff"}', b'{"prompt": "\\ud800"}', b'{"prompt": "\\udc00x"}', b"[]", b"5"]
    + [b'{"prompt": "a"} more', b'{"prompt": "a", "temperature": NaN}', b'{"x":' + b"[" * 100_000],
    ids=lambda body: repr(body[:24]),
)
def test_what_is_not_json_of_a_request(body: bytes) -> None:
    with pytest.raises(BadRequest):
        openai.parse(body, chat=False)


@pytest.mark.parametrize("value", [None, [], "hello", [5], {}])
def test_chat_needs_messages(value: Any) -> None:
    with pytest.raises(BadRequest) as caught:
        openai.parse(json.dumps({"messages": value}).encode(), chat=True)
    assert (caught.value.param or "").startswith("messages")


def test_only_the_served_model() -> None:
    for name in (None, "tiny", "small"):
        openai.check_model(name, CARD)
    with pytest.raises(NotFound) as caught:
        openai.check_model("gpt-9", CARD)
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")


@pytest.mark.parametrize("tokens", [[], [-1], [50], [3, 10**12]])
def test_prompts_of_wrong_ids(tokens: list[int]) -> None:
    with pytest.raises(BadRequest):
        openai.check_prompt(tokens, CARD)


@pytest.mark.parametrize("tokens", [[-1], [50]])
def test_ids_outside_the_vocabulary(tokens: list[int]) -> None:
    for name, value in (
        ("stop_token_ids", tokens),
        ("allowed_token_ids", tokens),
        ("logit_bias", {str(token): 1 for token in tokens}),
    ):
        with pytest.raises(BadRequest) as caught:
            openai.check_ids(completion(**{name: value}), CARD)
        assert caught.value.param == name


def test_a_prompt_that_is_only_echoed_may_fill_the_context() -> None:
    alone = completion(echo=True, max_tokens=0)
    assert openai.max_new(alone, 100, CARD, chat=False) == 0
    with pytest.raises(BadRequest):
        openai.max_new(alone, 101, CARD, chat=False)


@pytest.mark.parametrize(("num_prompt", "asked"), [(100, None), (101, 1), (90, 11)])
def test_too_long_for_the_context(num_prompt: int, asked: int | None) -> None:
    with pytest.raises(BadRequest) as caught:
        openai.max_new(completion(max_tokens=asked), num_prompt, CARD, chat=False)
    assert caught.value.code == "context_length_exceeded"


def test_min_tokens_over_max_tokens() -> None:
    with pytest.raises(BadRequest) as caught:
        openai.max_new(completion(min_tokens=17), 1, CARD, chat=False)
    assert caught.value.param == "min_tokens"


def event(frame: bytes) -> dict[str, Any]:
    assert frame.startswith(b"data: ")
    assert frame.endswith(b"\n\n")
    assert frame.count(b"\n") == 2
    return json.loads(frame[6:])


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("with_usage", [True, False])
def test_events(chat: bool, with_usage: bool) -> None:
    head = replies.head(chat, True, "id-1", 7, 'na"me')
    frames = replies.Frames(chat, head, 3, with_usage)
    said = event(frames.text('line\n"é🦊"\u2028'))
    assert said | {"choices": [], "usage": None} == head | {"choices": [], "usage": None}
    assert ("usage" in said) == with_usage
    (choice,) = said["choices"]
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (3, None, None)
    assert (choice["delta"]["content"] if chat else choice["text"]) == 'line\n"é🦊"\u2028'
    (choice,) = event(frames.last("length"))["choices"]
    assert (choice["delta"] if chat else choice["text"]) == ({} if chat else "")
    assert choice["finish_reason"] == "length"
    if chat:
        assert event(frames.first())["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    else:
        assert frames.first() == b""


def test_errors_have_the_envelope() -> None:
    assert json.loads(openai.error_body(Overloaded("full"))) == {
        "error": {"message": "full", "type": "rate_limit_error", "param": None, "code": None}
    }
    assert event(openai.error_frame(BadRequest("no", "n", "c")))["error"]["param"] == "n"
