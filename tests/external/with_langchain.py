"""LangChain's ChatOpenAI against a running server: python with_langchain.py URL"""

import asyncio
import sys
from typing import Literal

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, Field
from rows import Rows

HOW = {"base_url": f"{sys.argv[1]}/v1", "api_key": "none", "model": "diptych-demo", "temperature": 0, "max_retries": 0}
chat = ChatOpenAI(**HOW, max_tokens=300)
ASK = "What is a KV cache?"
scenario = Rows("langchain-openai")


class Place(BaseModel):
    """A place on a map."""

    city: Literal["Berlin", "Paris"] = Field(description="its name")  # the bundled model would never end a string
    people: Literal[1, 2, 3]


@tool
def weather(city: Literal["Berlin", "Paris"], days: Literal[1, 2, 3]) -> str:
    """The weather of a city in so many days."""
    return f"rain in {city}"


@scenario
def invoke() -> None:
    got = chat.invoke(ASK)
    assert got.content and got.usage_metadata["output_tokens"] > 0
    assert got.response_metadata["finish_reason"] == "stop"


@scenario
def stream() -> None:
    chunks = list(chat.stream(ASK))
    assert len(chunks) > 3 and "".join(chunk.content for chunk in chunks) == chat.invoke(ASK).content


@scenario
def stream_with_usage() -> None:
    whole = None
    for chunk in ChatOpenAI(**HOW, stream_usage=True).stream(ASK):
        whole = chunk if whole is None else whole + chunk
    assert whole.usage_metadata["output_tokens"] > 0


@scenario
def batch() -> None:
    assert len({got.content for got in chat.batch([ASK] * 8)}) == 1


@scenario
def asynchronous() -> None:
    async def both() -> None:
        assert (await chat.ainvoke(ASK)).content
        assert [chunk async for chunk in chat.astream(ASK)]

    asyncio.run(both())


@scenario
def structured_output_by_json_schema() -> None:
    got = chat.with_structured_output(Place, method="json_schema").invoke(ASK)
    assert isinstance(got, Place)


@scenario
def structured_output_by_function_calling() -> None:
    got = chat.with_structured_output(Place, method="function_calling").invoke(ASK)
    assert isinstance(got, Place)


@scenario
def tool_calls_and_their_results() -> None:
    bound = chat.bind_tools([weather], tool_choice="required", parallel_tool_calls=False)
    got = bound.invoke(ASK)
    (call,) = got.tool_calls
    assert call["name"] == "weather" and set(call["args"]) == {"city", "days"}
    result = ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"])
    assert chat.bind_tools([weather]).invoke([HumanMessage(ASK), got, result]).id


@scenario
def tool_calls_streamed() -> None:
    whole = None
    for chunk in chat.bind_tools([weather], tool_choice="weather").stream(ASK):
        whole = chunk if whole is None else whole + chunk
    assert [call["name"] for call in whole.tool_calls] == ["weather"]


@scenario
def logprobs() -> None:
    got = chat.bind(logprobs=True, top_logprobs=2).invoke(ASK)
    content = got.response_metadata["logprobs"]["content"]
    assert len(content[0]["top_logprobs"]) == 2


@scenario
def completions() -> None:
    assert OpenAI(**HOW, max_tokens=20).invoke("The fox")


scenario.run()
