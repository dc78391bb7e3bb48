"""Embeddings, scores, reranking and classes over real sockets, with a double for the cluster."""

import base64
from collections.abc import Iterator
from functools import partial
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from serve_doubles import FakeFrontend, Live, byte_level_tokenizer, pooling, serving, vector_of

from diptych.serve.text import Text

TEXT = Text(byte_level_tokenizer())


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with serving(TEXT, FakeFrontend(pooling), max_tokens=200, width=4, matryoshka=(2,)) as live:
        yield live


@pytest.fixture(scope="module")
def classifier() -> Iterator[Live]:
    with serving(TEXT, FakeFrontend(pooling), max_tokens=200, task="classify", labels=("LABEL_0",)) as live:
        yield live


def post(live: Live, path: str, body: dict[str, Any], status: int = 200) -> dict[str, Any]:
    reply = httpx.post(f"{live.url}{path}", json=body)
    assert reply.status_code == status, reply.text
    found: dict[str, Any] = reply.json()
    return found


def unit(text: str) -> list[float]:
    vector = vector_of(TEXT.encode(text))
    return list((vector / np.linalg.norm(vector)).tolist())


def test_embeddings_as_the_openai_client_asks(live: Live) -> None:
    """It asks for base64 unless told otherwise, and decodes it."""
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="-", max_retries=0) as client:
        got = client.embeddings.create(model="tiny", input=["hello world", "fox"])
        plain = client.embeddings.create(model="tiny", input="fox", encoding_format="float", dimensions=4)
    assert (got.object, got.model, [each.index for each in got.data]) == ("list", "tiny", [0, 1])
    assert got.data[0].embedding == pytest.approx(unit("hello world"))
    assert got.data[1].embedding == pytest.approx(plain.data[0].embedding)
    assert got.data[1].embedding == pytest.approx(unit("fox"))
    num = len(TEXT.encode("hello world")) + len(TEXT.encode("fox"))
    assert (got.usage.prompt_tokens, got.usage.total_tokens) == (num, num)


def test_an_embedding_in_other_shapes(live: Live) -> None:
    raw = post(live, "/v1/embeddings", {"input": "fox", "normalize": False})
    assert raw["data"] == [{"index": 0, "object": "embedding", "embedding": vector_of(TEXT.encode("fox")).tolist()}]
    assert raw["id"].startswith("embd-") and raw["object"] == "list"
    short = post(live, "/v1/embeddings", {"input": "fox", "dimensions": 2})["data"][0]["embedding"]
    assert np.linalg.norm(short) == pytest.approx(1.0) and len(short) == 2
    ids = post(live, "/v1/embeddings", {"input": [TEXT.encode("fox")], "encoding_format": "base64"})
    decoded = np.frombuffer(base64.b64decode(ids["data"][0]["embedding"]), "<f4")
    assert decoded == pytest.approx(unit("fox"), abs=1e-6)
    post(live, "/v1/embeddings", {"input": "fox", "pooling": "mean"})
    assert [job.sampling.pooling for job in live.frontend.jobs[-2:]] == ["last", "mean"]
    assert {job.max_new for job in live.frontend.jobs} == {0}


def test_more_inputs_than_go_at_a_time(live: Live) -> None:
    texts = [f"number {i}" for i in range(500)]
    got = post(live, "/v1/embeddings", {"input": texts})
    assert [each["index"] for each in got["data"]] == list(range(500))
    for each, text in zip(got["data"], texts, strict=True):
        assert each["embedding"] == pytest.approx(unit(text))


@pytest.mark.parametrize("path", ["/v1/score", "/score"])
def test_scores(live: Live, path: str) -> None:
    got = post(live, path, {"text_1": "fox", "text_2": ["fox", "hello world"]})
    assert got["id"].startswith("score-") and [each["object"] for each in got["data"]] == ["score"] * 2
    assert [each["score"] for each in got["data"]] == pytest.approx(
        [1.0, float(np.dot(unit("fox"), unit("hello world")))]
    )
    assert got["usage"]["prompt_tokens"] == sum(len(TEXT.encode(text)) for text in ("fox", "fox", "hello world"))


@pytest.mark.parametrize("path", ["/v1/rerank", "/rerank", "/v2/rerank"])
def test_a_reranking(live: Live, path: str) -> None:
    documents = ["hello world", {"text": "fox"}, "the lazy dog"]
    body = {"model": "tiny", "query": "fox", "documents": documents}
    got = post(live, path, body)
    assert got["results"][0] == {"index": 1, "relevance_score": pytest.approx(1.0), "document": {"text": "fox"}}
    scores = [each["relevance_score"] for each in got["results"]]
    assert scores == sorted(scores, reverse=True) and sorted(each["index"] for each in got["results"]) == [0, 1, 2]
    few = post(live, path, {**body, "top_n": 2, "return_documents": False})
    assert [list(each) for each in few["results"]] == [["index", "relevance_score"]] * 2
    assert len(post(live, path, {**body, "top_n": 9})["results"]) == 3


def test_a_cross_encoder_scores_pairs(classifier: Live) -> None:
    got = post(classifier, "/v1/score", {"queries": "fox", "documents": ["dog", "fox"]})
    pairs = [TEXT.tokenizer.encode("fox", each).ids for each in ("dog", "fox")]
    assert [job.tokens for job in classifier.frontend.jobs[-2:]] == pairs
    logits = [vector_of(pair)[0] - 5 for pair in pairs]
    assert [each["score"] for each in got["data"]] == pytest.approx([1 / (1 + np.exp(-logit)) for logit in logits])
    raw = post(classifier, "/v1/score", {"queries": "fox", "documents": ["dog"], "use_activation": False})
    assert raw["data"][0]["score"] == logits[0]
    assert post(classifier, "/v1/rerank", {"query": "fox", "documents": ["dog", "fox"]})["results"]


def test_classes() -> None:
    two = FakeFrontend(partial(pooling, num_labels=2))
    with serving(TEXT, two, task="classify", labels=("bad", "good")) as live:
        for path in ("/v1/classify", "/classify"):
            got = post(live, path, {"input": ["hello", "fox"]})
            for each, text in zip(got["data"], ("hello", "fox"), strict=True):
                logits = vector_of(TEXT.encode(text))[:2]
                powers = np.exp(logits - logits.max())
                assert each["probs"] == pytest.approx((powers / powers.sum()).tolist())
                assert (each["num_classes"], each["label"]) == (2, ("bad", "good")[int(logits.argmax())])
        assert "2 labels" in post(live, "/v1/score", {"text_1": "a", "text_2": "b"}, 400)["error"]["message"]


BAD: list[tuple[str, dict[str, Any], int, str | None]] = [
    ("/v1/embeddings", {}, 400, "input"),
    ("/v1/embeddings", {"input": ""}, 400, "input"),
    ("/v1/embeddings", {"input": []}, 400, "input"),
    ("/v1/embeddings", {"input": ["a", ""]}, 400, "input"),
    ("/v1/embeddings", {"input": 5}, 400, "input"),
    ("/v1/embeddings", {"input": [-1]}, 400, "input"),
    ("/v1/embeddings", {"input": "word " * 500}, 400, "input"),
    ("/v1/embeddings", {"input": ["a"] * 2049}, 400, "input"),
    ("/v1/embeddings", {"input": "a", "dimensions": 3}, 400, "dimensions"),
    ("/v1/embeddings", {"input": "a", "dimensions": 0}, 400, "dimensions"),
    ("/v1/embeddings", {"input": "a", "encoding_format": "octal"}, 400, "encoding_format"),
    ("/v1/embeddings", {"input": "a", "pooling": "cls"}, 400, "pooling"),
    ("/v1/embeddings", {"input": "a", "truncate_prompt_tokens": 5}, 400, "truncate_prompt_tokens"),
    ("/v1/embeddings", {"input": "a", "model": "other"}, 404, "model"),
    ("/v1/score", {"text_1": "a"}, 400, "text_1"),
    ("/v1/score", {"text_1": ["a", "b"], "text_2": ["c", "d", "e"]}, 400, "text_1"),
    ("/v1/rerank", {"query": "a", "documents": []}, 400, "documents"),
    ("/v1/rerank", {"query": "", "documents": ["b"]}, 400, "query"),
    ("/v1/rerank", {"query": "a", "documents": [{"title": "b"}]}, 400, "documents[0].text"),
    ("/v1/rerank", {"query": "a", "documents": ["b"], "top_n": -1}, 400, "top_n"),
    ("/v1/rerank", {"query": "a", "documents": ["b"], "max_tokens_per_doc": 9}, 400, "max_tokens_per_doc"),
    ("/v1/classify", {"input": "a"}, 400, "model"),
    ("/v1/rank", {"query": "a", "documents": ["b"]}, 404, None),
]


@pytest.mark.parametrize(("path", "body", "status", "param"), BAD)
def test_bad_requests_submit_nothing(
    live: Live, path: str, body: dict[str, Any], status: int, param: str | None
) -> None:
    before = len(live.frontend.jobs)
    error = post(live, path, body, status)["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"] and error["param"] == param
    assert len(live.frontend.jobs) == before


def test_a_classifier_writes_and_embeds_nothing(classifier: Live) -> None:
    before = len(classifier.frontend.jobs)
    for path, body in (
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ("/v1/embeddings", {"input": "a"}),
    ):
        error = post(classifier, path, body, 400)["error"]
        assert error["code"] == "unsupported_model" and "/v1/score" in error["message"]
    assert len(classifier.frontend.jobs) == before


def test_a_model_without_a_head_embeds_and_writes_nothing() -> None:
    with serving(TEXT, FakeFrontend(pooling), task="embed", width=4) as live:
        post(live, "/v1/embeddings", {"input": "a"})
        assert "made for embeddings" in post(live, "/v1/completions", {"prompt": "a"}, 400)["error"]["message"]
