"""`/tokenize` and `/detokenize`: vLLM's shapes, there and back."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serve_doubles import Live, serving, write_checkpoint

from diptych.serve.text import Text


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder: Path = write_checkpoint(tmp_path_factory.mktemp("checkpoint"))
    with serving(Text.load(folder)) as made:
        yield made


def post(live: Live, path: str, **body: Any) -> httpx.Response:
    return httpx.post(live.url + path, json=body)


@pytest.mark.parametrize("words", ["hello world", "né 🦊", "", "a " * 10_000])
def test_there_and_back(live: Live, words: str) -> None:
    got = post(live, "/tokenize", model="tiny", prompt=words).json()
    assert got["count"] == len(got["tokens"])
    assert got["max_model_len"] == 12_000
    assert got["token_strs"] is None
    assert post(live, "/detokenize", tokens=got["tokens"]).json() == {"prompt": words}


def test_a_chat(live: Live) -> None:
    got = post(live, "/tokenize", messages=[{"role": "user", "content": "hello"}], return_token_strs=True).json()
    assert got["token_strs"][0] == "<|user|>"
    back = post(live, "/detokenize", tokens=got["tokens"]).json()["prompt"]
    assert back == "<|user|>hello<|end|><|assistant|>"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"add_generation_prompt": False}, "<|user|>hello<|end|>"),
        ({"continue_final_message": True}, "<|user|>hello"),
        ({"continue_final_message": True, "add_generation_prompt": False}, "<|user|>hello"),
    ],
)
def test_where_a_chat_ends(live: Live, fields: dict[str, Any], expected: str) -> None:
    got = post(live, "/tokenize", messages=[{"role": "user", "content": "hello"}], **fields).json()
    assert post(live, "/detokenize", tokens=got["tokens"]).json()["prompt"] == expected


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": []}, 400, "prompt"),
        ("/tokenize", {"prompt": 5}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "model": "other"}, 404, "model"),
        ("/tokenize", {"messages": [{"content": "a"}]}, 400, "messages[0].role"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": [10**6]}, 400, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, 400, "tokens[0]"),
    ],
)
def test_bad_requests(live: Live, path: str, body: dict[str, Any], status: int, param: str | None) -> None:
    got = post(live, path, **body)
    assert (got.status_code, got.json()["error"]["param"]) == (status, param)
