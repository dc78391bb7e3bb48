"""OpenAI's Python client against a running server: python with_openai.py URL"""

import asyncio
import json
import sys
from typing import Literal

import openai
from pydantic import BaseModel
from rows import Rows

MODEL = "diptych-demo"
HELLO = [{"role": "user", "content": "What is prefill?"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "enum": ["Berlin", "Paris"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
client = openai.OpenAI(base_url=f"{sys.argv[1]}/v1", api_key="none", max_retries=0, timeout=60)
scenario = Rows("openai (Python)")


@scenario
def models() -> None:
    assert MODEL in [model.id for model in client.models.list()]
    assert client.models.retrieve(MODEL).id == MODEL


@scenario
def chat_whole_and_streamed_agree() -> None:
    whole = client.chat.completions.create(model=MODEL, messages=HELLO, temperature=0)
    stream = client.chat.completions.create(
        model=MODEL, messages=HELLO, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content and text
    assert chunks[-1].usage == whole.usage


@scenario
def the_stream_helper() -> None:
    with client.chat.completions.stream(model=MODEL, messages=HELLO, temperature=0) as stream:
        kinds = {event.type for event in stream}
        assert {"chunk", "content.delta", "content.done"} <= kinds, kinds
        assert stream.get_final_completion().choices[0].finish_reason == "stop"


@scenario
def completions_with_everything() -> None:
    got = client.completions.create(
        model=MODEL, prompt=["The fox", "The code of"], n=2, best_of=3, echo=True, logprobs=2, max_tokens=8, seed=1
    )
    assert [choice.index for choice in got.choices] == [0, 1, 2, 3]
    assert got.choices[0].text.startswith("The fox") and got.choices[0].logprobs.token_logprobs[0] is None
    again = client.completions.create(
        model=MODEL, prompt=["The fox", "The code of"], n=2, best_of=3, echo=True, logprobs=2, max_tokens=8, seed=1
    )
    assert [choice.text for choice in got.choices] == [choice.text for choice in again.choices]


@scenario
def logprobs_of_a_chat() -> None:
    got = client.chat.completions.create(
        model=MODEL, messages=HELLO, temperature=0, logprobs=True, top_logprobs=3, max_tokens=6
    )
    content = got.choices[0].logprobs.content
    assert len(content) == 6 and all(entry.logprob == entry.top_logprobs[0].logprob for entry in content)


class Place(BaseModel):
    """What a structured answer is to be."""

    city: Literal["Berlin", "Paris"]  # the bundled model would never end a string
    people: Literal[1, 2, 3]


@scenario
def structured_output_by_a_pydantic_model() -> None:
    got = client.chat.completions.parse(model=MODEL, messages=HELLO, response_format=Place, max_tokens=200)
    assert isinstance(got.choices[0].message.parsed, Place)


@scenario
def a_required_call_whole_and_streamed() -> None:
    how = {"model": MODEL, "messages": HELLO, "tools": [TOOL], "tool_choice": "required", "seed": 3, "max_tokens": 400}
    how["parallel_tool_calls"] = False
    whole = client.chat.completions.create(**how)
    (call,) = whole.choices[0].message.tool_calls
    assert whole.choices[0].finish_reason == "tool_calls" and call.function.name == "weather"
    assert set(json.loads(call.function.arguments)) == {"city", "days"}
    deltas = [
        d for c in client.chat.completions.create(stream=True, **how) for d in c.choices[0].delta.tool_calls or []
    ]
    assert "".join(delta.function.arguments for delta in deltas) == call.function.arguments
    assert len(deltas) > 3


@scenario
def a_named_call_and_its_result_sent_back() -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    got = client.chat.completions.create(
        model=MODEL, messages=HELLO, tools=[TOOL], tool_choice=named, max_tokens=400, temperature=0
    )
    message = got.choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"}
    more = [*HELLO, message, result]
    assert client.chat.completions.create(model=MODEL, messages=more, tools=[TOOL], max_tokens=20).choices


@scenario
def errors_have_their_types() -> None:
    for kind, how in (
        (openai.NotFoundError, {"model": "nobody"}),
        (openai.BadRequestError, {"temperature": 9}),
        (openai.BadRequestError, {"max_tokens": 10**6}),
        (openai.BadRequestError, {"tools": [{"type": "magic"}]}),
    ):
        try:
            client.chat.completions.create(**{"model": MODEL, "messages": HELLO, **how})
        except kind as error:
            assert error.body["message"] and error.request_id
        else:
            raise AssertionError(f"no {kind.__name__} for {how}")


@scenario
def a_request_id_of_ones_own_comes_back() -> None:
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=HELLO, max_tokens=1, extra_headers={"X-Request-Id": "mine-1"}
    )
    assert raw.headers["x-request-id"] == "mine-1"


@scenario
def leaving_a_stream_early() -> None:
    stream = client.chat.completions.create(model=MODEL, messages=HELLO, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    assert client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=3).choices


@scenario
def thirty_two_at_once() -> None:
    async def all_of_them() -> set[str]:
        async with openai.AsyncOpenAI(base_url=f"{sys.argv[1]}/v1", api_key="none", max_retries=0) as many:
            calls = [many.chat.completions.create(model=MODEL, messages=HELLO, temperature=0) for _ in range(32)]
            return {got.choices[0].message.content for got in await asyncio.gather(*calls)}

    assert len(asyncio.run(all_of_them())) == 1


scenario.run()
