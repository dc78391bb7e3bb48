"""Every way of asking, and what a live server answers to it: the same in every mode, or something is wrong.

`WAYS` is feature -> (route, body). Replies are compared without what is new in each of them (ids, times, how much of a
prompt was cached); numbers may differ by 1e-3, since chunks change the order of sums in their last bits.
"""

import json
from typing import Any

import httpx

NOTES = "Anna keeps bees. Boris sells maps. Clara mends clocks. Dora grows figs. " * 6
STORY = "Tell me a story about a fox."
ZOO = {
    "type": "object",
    "properties": {"animal": {"enum": ["fox", "owl", "bear"]}, "age": {"type": "integer"}},
    "required": ["animal", "age"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "find", "description": "finds an animal", "parameters": ZOO}}
NEW = frozenset(("id", "created", "system_fingerprint", "prompt_tokens_details"))
NEAR = 1e-3

_TEXT: dict[str, dict[str, Any]] = {
    "greedy": {"max_tokens": 24, "temperature": 0},
    "sampled, seeded": {"max_tokens": 24, "temperature": 0.9, "top_p": 0.9, "top_k": 40, "seed": 7},
    "min_p": {"max_tokens": 24, "temperature": 1.2, "min_p": 0.05, "seed": 8},
    "penalties": {"temperature": 0, "frequency_penalty": 0.7, "presence_penalty": 0.4, "repetition_penalty": 1.2},
    "logit_bias": {"max_tokens": 16, "temperature": 0, "logit_bias": {"17": 30.0, "40": -100.0}},
    "n = 3, seeded": {"max_tokens": 16, "n": 3, "temperature": 0.9, "top_p": 0.9, "seed": 11},
    "best_of": {"max_tokens": 12, "n": 2, "best_of": 4, "temperature": 1.0, "seed": 12},
    "stop strings": {"max_tokens": 40, "temperature": 0, "stop": ["an", "er", "."]},
    "stop ids": {"max_tokens": 40, "temperature": 0, "ignore_eos": False, "stop_token_ids": list(range(20, 60))},
    "min_tokens": {"max_tokens": 40, "temperature": 0, "ignore_eos": False, "min_tokens": 30},
    "logprobs": {"max_tokens": 12, "temperature": 0.8, "seed": 9, "logprobs": 4},
    "prompt logprobs": {"max_tokens": 4, "temperature": 0, "echo": True, "logprobs": 2},
    "a batch of prompts": {"prompt": [NOTES, "The owl", "A bear that"], "max_tokens": 12, "temperature": 0},
    "JSON of a schema": {"max_tokens": 60, "temperature": 0.8, "seed": 3, "guided_json": ZOO, "ignore_eos": False},
    "a regex": {"max_tokens": 40, "temperature": 0.8, "seed": 4, "guided_regex": "[a-c]{6,9}\\.", "ignore_eos": False},
    "a choice": {"max_tokens": 20, "temperature": 0.8, "guided_choice": ["a fox", "an owl"], "seed": 5},
    "streamed": {"max_tokens": 24, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}},
    "everything": {
        "max_tokens": 24, "n": 2, "temperature": 1.1, "seed": 5, "top_k": 40, "min_p": 0.02, "frequency_penalty": 0.3,
        "logit_bias": {"17": 3.0}, "stop": ["q"], "logprobs": 2,
    },
    "hardly a temperature": {"max_tokens": 8, "seed": 3, "temperature": 5e-324, "repetition_penalty": 0.01},
}  # fmt: skip
_CHAT: dict[str, dict[str, Any]] = {
    "chat": {"max_tokens": 24, "temperature": 0},
    "chat, top_logprobs": {"max_tokens": 8, "temperature": 0, "logprobs": True, "top_logprobs": 3},
    "a tool call": {"max_tokens": 80, "temperature": 0.8, "seed": 6, "tools": [TOOL], "tool_choice": "required"},
}
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    name: ("/v1/completions", {"prompt": f"{name}: {NOTES}", "ignore_eos": True, **body})
    for name, body in _TEXT.items()
}
WAYS |= {
    name: ("/v1/chat/completions", {"messages": [{"role": "user", "content": f"{name}: {STORY}"}], **body})
    for name, body in _CHAT.items()
}
WAYS |= {
    "the same again (prefix)": ("/v1/completions", {"prompt": NOTES * 2, "max_tokens": 12, "temperature": 0}),
    "embeddings": ("/v1/embeddings", {"input": ["The fox", NOTES]}),
    "score": ("/v1/score", {"text_1": "The fox", "text_2": ["A fox", "The code"]}),
    "rerank": ("/v1/rerank", {"query": "The fox", "documents": ["An owl", "A fox", "The code"]}),
}


def ask(http: httpx.Client, url: str, way: str) -> Any:
    """What the server answers, without what is new in every reply; a stream's events put together."""
    route, body = WAYS[way]
    for _ in range(2 if "again" in way else 1):
        reply = http.post(url + route, json=body)
        assert reply.status_code == 200, f"{way}: {reply.text}"
    return _without_news(_joined(reply.text) if body.get("stream") else reply.json())


def _joined(events: str) -> Any:
    said = [json.loads(line[6:]) for line in events.splitlines() if line.startswith("data: {")]
    choices = [choice for event in said for choice in event["choices"]]
    ends = [choice["finish_reason"] for choice in choices if choice["finish_reason"]]
    return {"text": "".join(c["text"] for c in choices), "ends": ends, "usage": said[-1]["usage"]}


def _without_news(said: Any) -> Any:
    match said:
        case dict():
            return {key: _without_news(value) for key, value in said.items() if key not in NEW}
        case list():
            return [_without_news(each) for each in said]
    return said


def difference(one: Any, other: Any, where: str = "") -> str:
    """Where two replies differ, or ""."""
    match one, other:
        case dict(), dict() if one.keys() == other.keys():
            found = (difference(one[key], other[key], f"{where}.{key}") for key in one)
        case list(), list() if len(one) == len(other):
            found = (difference(a, b, f"{where}[{i}]") for i, (a, b) in enumerate(zip(one, other, strict=True)))
        case float(), float():
            return "" if abs(one - other) <= NEAR else f"{where}: {one} and {other}"
        case _:
            return "" if one == other else f"{where}: {one!r} and {other!r}"
    return next((each for each in found if each), "")
