"""Many jobs of one request: all of them or none, nothing left behind, everything counted."""

import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from serve_doubles import FakeFrontend, byte_level_tokenizer, pooling, saying, serving

from diptych.errors import Unavailable
from diptych.policy.messages import Reason
from diptych.serve.frontend import Chunk, Job
from diptych.serve.text import Text
from diptych.serve.vectors import WINDOW

TEXT = Text(byte_level_tokenizer())
MANY = {"input": [f"text {i}" for i in range(2 * WINDOW)]}


def counted(url: str) -> dict[str, float]:
    """The scrape's samples of ours that are not zero."""
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if line.startswith("diptych_")]
    return {name: float(value) for name, value in pairs if float(value)}


def test_what_was_computed_is_counted() -> None:
    with serving(TEXT, FakeFrontend(pooling)) as live:
        assert httpx.post(f"{live.url}/v1/embeddings", json={"input": ["hello", "fox"]}).status_code == 200
        seen = counted(live.url)
    assert seen['diptych_requests_total{reason="computed"}'] == seen["diptych_e2e_request_latency_seconds_count"] == 2
    assert seen["diptych_prompt_tokens_total"] == len(TEXT.encode("hello")) + len(TEXT.encode("fox"))
    assert seen["diptych_prompt_tokens_cached_total"] == 4
    assert not {"diptych_requests_running", "diptych_generation_tokens_total"} & set(seen)


@pytest.mark.parametrize(
    ("chunk", "status", "how"),
    [
        (Chunk([], error=(503, "no worker is up")), 503, "rejected"),
        (Chunk([], error=(429, "4096 requests are in flight")), 429, "rejected"),
        (Chunk([], error=(400, "does not fit")), 400, "failed"),
        (Chunk([], Reason.COMPUTED), 500, "failed"),
    ],
)
def test_the_first_error_is_the_reply_and_ends_the_others(chunk: Chunk, status: int, how: str) -> None:
    def answer(job: Job) -> Iterator[Chunk]:
        if job.tokens == TEXT.encode("text 3"):
            yield chunk
        elif job.tokens < TEXT.encode("text 3"):
            yield from pooling(job)

    with serving(TEXT, FakeFrontend(answer)) as live:
        reply = httpx.post(f"{live.url}/v1/embeddings", json=MANY)
        assert reply.status_code == status and set(reply.json()["error"]) == {"message", "type", "param", "code"}
        assert ("retry-after" in reply.headers) == (status in (429, 503))
        seen = counted(live.url)
        num = {
            reason: seen.get(f'diptych_requests_total{{reason="{reason}"}}', 0) for reason in ("computed", "cancelled")
        }
        assert seen[f'diptych_requests_total{{reason="{how}"}}'] == 1 and "diptych_requests_running" not in seen
        assert len(live.frontend.jobs) <= 2 * WINDOW
        assert len(live.frontend.cancelled) == num["cancelled"] == len(live.frontend.jobs) - num["computed"] - 1


def test_a_router_that_is_gone_is_a_503() -> None:
    with serving(TEXT, FakeFrontend(pooling, refuse=Unavailable("the router is gone"))) as live:
        reply = httpx.post(f"{live.url}/v1/embeddings", json=MANY)
        assert reply.status_code == 503 and reply.headers["retry-after"]
        assert live.frontend.cancelled == []


def test_a_client_that_leaves_cancels_all_that_was_submitted_and_no_more_is() -> None:
    with serving(TEXT, FakeFrontend(saying())) as live:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{live.url}/v1/embeddings", json=MANY, timeout=0.3)
        assert live.wait_until(lambda: len(live.frontend.cancelled) == WINDOW)
        assert len(live.frontend.jobs) == WINDOW and sorted(live.frontend.cancelled) == list(range(1, WINDOW + 1))
        assert counted(live.url)['diptych_requests_total{reason="cancelled"}'] == WINDOW


def test_requests_do_not_wait_for_each_other() -> None:
    """One of many inputs that nobody answers, and a short one beside it."""

    def answer(job: Job) -> Any:
        return pooling(job) if job.tokens == TEXT.encode("short") else ()

    with serving(TEXT, FakeFrontend(answer)) as live:
        gone = threading.Thread(
            target=lambda: pytest.raises(
                httpx.ReadTimeout, httpx.post, f"{live.url}/v1/embeddings", json=MANY, timeout=1.0
            )
        )
        gone.start()
        assert live.wait_until(lambda: len(live.frontend.jobs) >= WINDOW)
        assert httpx.post(f"{live.url}/v1/embeddings", json={"input": "short"}).status_code == 200
        gone.join()


@pytest.mark.parametrize(
    ("path", "body"), [("embeddings", {"input": "fox"}), ("score", {"text_1": "a", "text_2": "b"})]
)
def test_they_are_found_by_the_id_of_their_reply(path: str, body: dict[str, Any]) -> None:
    with serving(TEXT, FakeFrontend(pooling)) as live:
        plain = httpx.post(f"{live.url}/v1/{path}", json=body).json()
        traced = httpx.post(f"{live.url}/v1/{path}", json=body, headers={"X-Diptych-Trace": "1"}).json()
        assert "diptych" not in plain
        found = httpx.get(f"{live.url}/requests/{plain['id']}").json()["requests"]
        assert {one["id"] for one in found} == {plain["id"]} and len(found) == len(live.frontend.jobs) / 2
        assert {one["id"] for one in traced["diptych"]["trace"]} == {traced["id"]}
