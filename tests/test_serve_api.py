"""The API process over real sockets: the openai client for the main ways, httpx for everything that goes wrong."""

import asyncio
import json
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from serve_doubles import FakeFrontend, Live, byte_level_tokenizer, saying, serving, write_checkpoint

from diptych.errors import Conflict, NotFound, Unavailable
from diptych.policy.messages import Reason
from diptych.serve.api import Settings
from diptych.serve.frontend import Chunk, Job
from diptych.serve.text import Text


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    return Text.load(write_checkpoint(tmp_path_factory.mktemp("checkpoint")))


@pytest.fixture(scope="module")
def shared(text: Text) -> Iterator[Live]:
    """A server whose model echoes its prompt."""
    with serving(text, settings=Settings(max_body_bytes=200_000), max_tokens=12_000) as live:
        yield live


@pytest.fixture
def live(shared: Live) -> Live:
    shared.frontend.jobs.clear()
    shared.frontend.cancelled.clear()
    shared.frontend.rows, shared.frontend.well, shared.frontend.refuse = [], True, None
    return shared


@pytest.fixture
def client(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="-", max_retries=0, timeout=10) as made:
        yield made


HELLO: list[Any] = [{"role": "user", "content": "hello world"}]
LONG: list[Any] = [{"role": "user", "content": "a " * 12_000}]
IMAGE: list[Any] = [{"role": "user", "content": [{"type": "image_url"}]}]


def events(response: httpx.Response) -> list[Any]:
    """The data of each server-sent event; the end marker as a string."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def assert_envelope(response: httpx.Response, status: int) -> dict[str, Any]:
    """Check the error envelope and return what is in it."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    (name, error), *rest = response.json().items()
    assert (name, rest) == ("error", [])
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"]
    return dict(error)


# --- the main ways ---------------------------------------------------------------------------------------------


def test_completion(client: openai.OpenAI, live: Live, text: Text) -> None:
    got = client.completions.create(model="tiny", prompt="hello world", max_tokens=50, seed=7, temperature=0.5)
    assert got.id.startswith("cmpl-")
    assert (got.object, got.model) == ("text_completion", "tiny")
    assert (got.choices[0].text, got.choices[0].finish_reason) == ("hello world", "stop")
    num = len(text.encode("hello world"))
    assert got.usage
    assert (got.usage.prompt_tokens, got.usage.completion_tokens, got.usage.total_tokens) == (num, num + 1, 2 * num + 1)
    assert got.usage.prompt_tokens_details
    assert got.usage.prompt_tokens_details.cached_tokens == 3
    (job,) = live.frontend.jobs
    assert (job.tokens, job.max_new) == (text.encode("hello world"), 50)
    assert (job.sampling.seed, job.sampling.temperature, job.sampling.stop_ids) == (7, 0.5, text.stop_ids)
    assert live.frontend.cancelled == []


def test_completion_streamed(client: openai.OpenAI) -> None:
    chunks = list(client.completions.create(model="tiny", prompt="hello world", max_tokens=4, stream=True))
    said = "".join(chunk.choices[0].text for chunk in chunks)
    assert said == "hello world"[: len(said)]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert len({chunk.id for chunk in chunks}) == 1


def test_chat(client: openai.OpenAI, live: Live, text: Text) -> None:
    got = client.chat.completions.create(model="tiny", messages=HELLO)
    assert got.id.startswith("chatcmpl-")
    assert got.object == "chat.completion"
    assert (got.choices[0].message.role, got.choices[0].message.content) == ("assistant", "hello world")
    (job,) = live.frontend.jobs
    assert text.tokenizer.decode(job.tokens, skip_special_tokens=False) == "<|user|>hello world<|end|><|assistant|>"
    assert job.max_new == 12_000 - len(job.tokens), "chat may fill the context"
    assert len(job.hashes) == len(job.tokens) // 16


def test_chat_streamed_with_usage(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="tiny", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "hello world"
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == []
    assert last.usage
    assert last.usage.total_tokens == last.usage.prompt_tokens + last.usage.completion_tokens


def test_prompt_of_token_ids(client: openai.OpenAI, live: Live, text: Text) -> None:
    ids = (text.encode("hello world") * 10_000)[:10_000]
    got = client.completions.create(model="tiny", prompt=ids, max_tokens=5)
    assert got.choices[0].text == text.decode(ids[:5])
    (job,) = live.frontend.jobs
    assert job.tokens == ids
    assert len(job.hashes) == 10_000 // 16


@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts(client: openai.OpenAI, live: Live, text: Text, stream: bool) -> None:
    prompts = ["hello", "world", "the quick brown fox"]
    got = client.completions.create(model="tiny", prompt=prompts, stream=stream, max_tokens=50)
    said = ["", "", ""]
    for chunk in got if stream else [got]:
        for choice in chunk.choices:
            said[choice.index] += choice.text
    assert said == prompts
    assert [job.tokens for job in live.frontend.jobs] == [text.encode(prompt) for prompt in prompts]


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string_across_tokens(client: openai.OpenAI, live: Live, text: Text, stream: bool) -> None:
    prompt = "aSTxSTOP and more"
    assert not any("TOP a" in text.decode([token]) for token in text.encode(prompt))
    got = client.completions.create(model="tiny", prompt=prompt, stop=["zz", "TOP a"], max_tokens=50, stream=stream)
    chunks = list(got) if stream else [got]
    assert "".join(chunk.choices[0].text for chunk in chunks) == "aSTxS"
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert live.wait_until(lambda: live.frontend.cancelled == [1]), "the router goes on for nothing"


def test_characters_split_over_tokens_are_never_broken(client: openai.OpenAI, text: Text) -> None:
    prompt = "né 🦊 你好"
    assert len(text.encode(prompt)) > len(prompt)
    pieces = [
        c.choices[0].text for c in client.completions.create(model="tiny", prompt=prompt, max_tokens=60, stream=True)
    ]
    assert "".join(pieces) == prompt
    assert not any("\ufffd" in piece for piece in pieces)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "alias"]
    assert client.models.retrieve("alias").id == "alias"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("org/other")
    assert client.completions.create(model="alias", prompt="hi").model == "alias"


def test_priority_and_salt(live: Live) -> None:
    body = {"prompt": "hello world " * 9, "max_tokens": 500, "priority": 5}
    assert httpx.post(f"{live.url}/v1/completions", json=body).status_code == 200
    assert events(httpx.post(f"{live.url}/v1/completions", json=body | {"cache_salt": "me", "stream": True}))
    one, other = live.frontend.jobs
    assert one.priority == 5
    assert one.tokens == other.tokens
    assert one.hashes
    assert set(one.hashes).isdisjoint(other.hashes)


# --- looking in ------------------------------------------------------------------------------------------------


def test_looking_in(live: Live) -> None:
    live.frontend.rows = [{"id": "p0", "role": "prefill", "pid": 1, "state": "up", "running": 2, "waiting": 0}]
    assert httpx.get(f"{live.url}/workers").json() == {"workers": live.frontend.rows}
    assert httpx.get(f"{live.url}/version").json()["version"]
    (one, alias) = httpx.get(f"{live.url}/v1/models").json()["data"]
    assert time.time() - 600 < one["created"] == alias["created"] <= time.time(), "when it was started"
    metrics = httpx.get(f"{live.url}/metrics").text
    assert 'diptych_worker_requests_running{role="prefill",worker="p0"} 2.0' in metrics
    assert "diptych_time_to_first_token_seconds_bucket" in metrics
    page = httpx.get(live.url)
    assert page.headers["content-type"].startswith("text/html")
    assert f"curl {live.url}/v1/chat/completions" in page.text


def test_health_says_what_the_router_says(live: Live) -> None:
    assert httpx.get(f"{live.url}/health").status_code == 200
    live.frontend.silent = [{"workers": ["d0", "p0"], "seconds": 31.0}]
    tired = httpx.get(f"{live.url}/health")
    assert (tired.status_code, tired.json()["status"]) == (200, "degraded")
    live.frontend.silent = []
    live.frontend.well = False
    sick = httpx.get(f"{live.url}/health")
    assert (sick.status_code, sick.json()) == (503, {"status": "unhealthy", "workers": 0, "silent": []})


def test_a_router_that_does_not_answer(text: Text) -> None:
    class Silent(FakeFrontend):
        async def workers(self) -> list[dict[str, Any]]:
            raise Unavailable("the router is gone")

        async def health(self) -> tuple[bool, dict[str, Any]]:
            await asyncio.sleep(60)
            return True, {}

    with serving(text, Silent(), Settings(control_timeout_s=0.1)) as live:
        assert_envelope(httpx.get(f"{live.url}/workers"), 503)
        assert httpx.get(f"{live.url}/health").status_code == 503
        assert httpx.get(f"{live.url}/metrics").status_code == 200


# --- what goes wrong -------------------------------------------------------------------------------------------

BAD: list[tuple[str, str, Any, int, str | None]] = [
    ("no json", "/v1/completions", b"{", 400, None),
    ("not utf-8", "/v1/completions", b'{"prompt": "\xff"}', 400, None),
    ("no body", "/v1/chat/completions", b"", 400, None),
    ("no prompt", "/v1/completions", {}, 400, "prompt"),
    ("empty prompt", "/v1/completions", {"prompt": ""}, 400, "prompt"),
    ("ids too large", "/v1/completions", {"prompt": [10**9]}, 400, "prompt"),
    ("mixed prompts", "/v1/completions", {"prompt": ["a", 1]}, 400, "prompt"),
    ("one bad among several", "/v1/completions", {"prompt": ["a", ""]}, 400, "prompt"),
    ("temperature", "/v1/completions", {"prompt": "a", "temperature": 3}, 400, "temperature"),
    ("logprobs", "/v1/completions", {"prompt": "a", "logprobs": True}, 400, "logprobs"),
    ("n", "/v1/chat/completions", {"messages": HELLO, "n": 1000}, 400, "n"),
    ("n of many", "/v1/completions", {"prompt": ["a"] * 5, "n": 100}, 400, "n"),
    ("chat logprobs", "/v1/chat/completions", {"messages": HELLO, "logprobs": 3}, 400, "logprobs"),
    ("top alone", "/v1/chat/completions", {"messages": HELLO, "top_logprobs": 3}, 400, "top_logprobs"),
    ("chat echo", "/v1/chat/completions", {"messages": HELLO, "echo": True}, 400, "echo"),
    ("max_tokens", "/v1/completions", {"prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
    ("too many asked", "/v1/completions", {"prompt": "a", "max_tokens": 12_000}, 400, "prompt"),
    ("prompt too long", "/v1/completions", {"prompt": [5] * 12_000}, 400, "prompt"),
    ("text too long", "/v1/completions", {"prompt": "a " * 12_000}, 400, "prompt"),
    ("chat too long", "/v1/chat/completions", {"messages": LONG}, 400, "messages"),
    ("model", "/v1/completions", {"prompt": "a", "model": "gpt-9"}, 404, "model"),
    ("no messages", "/v1/chat/completions", {"messages": []}, 400, "messages"),
    ("no role", "/v1/chat/completions", {"messages": [{"content": "a"}]}, 400, "messages[0].role"),
    ("image", "/v1/chat/completions", {"messages": IMAGE}, 400, "messages[0].content[0]"),
    ("body too large", "/v1/completions", b" " * 200_001, 413, None),
    ("no route", "/v1/nothing", {}, 404, None),
    ("a slash too many", "/v1/completions/", {"prompt": "a"}, 404, None),
    ("wrong method", "/v1/models", {}, 405, None),
]


@pytest.mark.parametrize(("path", "body", "status", "param"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_bad_requests(live: Live, path: str, body: Any, status: int, param: str | None, stream: bool) -> None:
    content = body if isinstance(body, bytes) else json.dumps({**body, "stream": stream})
    error = assert_envelope(httpx.post(live.url + path, content=content), status)
    assert error["param"] == param
    assert live.frontend.jobs == [], "a bad request costs nothing"


def test_a_worker_is_drained(live: Live) -> None:
    url = f"{live.url}/workers/d0/drain"
    got = httpx.post(url)
    assert (got.status_code, got.json()["state"], got.json()["timeout_s"]) == (202, "draining", None)
    got = httpx.post(url, json={"timeout_s": 2.5, "force": True})
    assert (got.json()["timeout_s"], got.json()["forced"]) == (2.5, True)
    for body in ({"timeout_s": -1}, {"timeout_s": "soon"}, {"forced": True}, []):
        assert httpx.post(url, json=body).status_code == 400
    for error, status in ((NotFound("no such worker"), 404), (Conflict("it is needed"), 409)):
        live.frontend.refuse = error
        got = httpx.post(url)
        live.frontend.refuse = None
        assert got.status_code == status and got.json()["error"]["message"] == str(error)


def test_codes_that_clients_look_for(live: Live) -> None:
    too_long = httpx.post(f"{live.url}/v1/completions", json={"prompt": [5] * 12_000})
    assert too_long.json()["error"]["code"] == "context_length_exceeded"
    enormous = httpx.post(f"{live.url}/v1/completions", json={"prompt": "a" * 190_000, "max_tokens": 1})
    assert enormous.json()["error"]["code"] == "context_length_exceeded"
    unknown = httpx.post(f"{live.url}/v1/completions", json={"prompt": "a", "model": "x"})
    assert unknown.json()["error"]["code"] == "model_not_found"
    assert "POST" in httpx.get(f"{live.url}/v1/completions").headers["allow"]


def test_a_body_without_length_is_limited_too(live: Live) -> None:
    response = httpx.post(f"{live.url}/v1/completions", content=(b" " * 50_000 for _ in range(5)))
    assert_envelope(response, 413)


def test_the_connection_survives_a_body_that_was_too_large(live: Live) -> None:
    with httpx.Client(base_url=live.url) as http:
        assert_envelope(http.post("/v1/completions", content=b" " * 2_000_000), 413)
        assert http.post("/v1/completions", json={"prompt": "hello"}).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("status", [429, 503])
def test_the_router_turns_a_request_away(text: Text, status: int, stream: bool) -> None:
    frontend = FakeFrontend(saying(Chunk([], error=(status, "queues are full"))))
    with serving(text, frontend, Settings(retry_after_s=3)) as live:
        response = httpx.post(f"{live.url}/v1/completions", json={"prompt": "a", "stream": stream})
        assert assert_envelope(response, status)["message"] == "queues are full"
        assert response.headers["retry-after"] == "3"
        assert frontend.cancelled == []
        assert 'diptych_requests_total{reason="rejected"} 1.0' in httpx.get(f"{live.url}/metrics").text


def test_the_router_cannot_be_reached(live: Live) -> None:
    live.frontend.refuse = Unavailable("no router")
    response = httpx.post(f"{live.url}/v1/completions", json={"prompt": ["a", "b"]})
    assert_envelope(response, 503)
    assert response.headers["retry-after"]


def test_a_mistake_of_ours_is_a_500(live: Live) -> None:
    live.frontend.refuse = RuntimeError("boom: secret")
    error = assert_envelope(httpx.post(f"{live.url}/v1/completions", json={"prompt": "a"}), 500)
    assert "secret" not in error["message"]


def test_an_error_after_the_stream_began_is_an_event(text: Text) -> None:
    frontend = FakeFrontend(saying(Chunk(text.encode("hello")), Chunk([], error=(500, "the worker is gone"))))
    with serving(text, frontend) as live:
        response = httpx.post(f"{live.url}/v1/completions", json={"prompt": "a", "stream": True})
        *said, last = events(response)
        assert response.status_code == 200
        assert "".join(event["choices"][0]["text"] for event in said) == "hello"
        assert last["error"]["message"] == "the worker is gone"
        client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="-", max_retries=0)
        with pytest.raises(openai.APIError, match="the worker is gone"):
            list(client.completions.create(model="tiny", prompt="a", stream=True))


def test_one_of_several_prompts_fails(text: Text) -> None:
    def answer(job: Job) -> list[Chunk]:
        return [Chunk([], error=(500, "broken"))] if job.tokens == text.encode("b") else []

    with serving(text, FakeFrontend(answer)) as live:
        assert_envelope(httpx.post(f"{live.url}/v1/completions", json={"prompt": ["a", "b", "hello"]}), 500)
        assert sorted(live.frontend.cancelled) == [1, 3]


def test_an_answer_that_was_given_up_is_an_error(text: Text) -> None:
    with serving(text, FakeFrontend(saying(Chunk([5], Reason.WORKER_LOST)))) as live:
        assert_envelope(httpx.post(f"{live.url}/v1/completions", json={"prompt": "a"}), 503)


# --- connections -----------------------------------------------------------------------------------------------


def test_request_ids(live: Live) -> None:
    def ident(given: str | bytes | None) -> str:
        headers = {} if given is None else {"X-Request-Id": given}
        return httpx.get(f"{live.url}/version", headers=headers).headers["x-request-id"]

    assert ident("abc-123") == "abc-123"
    assert ident(None) != ident(None)
    for unsafe in ("x" * 129, "a b", b"\xff\xfe"):
        assert ident(unsafe) not in ("", unsafe)


def test_kept_alive_connections_do_not_hiccup(live: Live) -> None:
    """A front end without TCP_NODELAY delivers the second request's tokens in one lump, 40 ms late."""
    took = []
    with httpx.Client(base_url=live.url) as http:
        for _ in range(9):
            began = time.perf_counter()
            with http.stream("POST", "/v1/completions", json={"prompt": "hello world", "stream": True}) as response:
                assert "[DONE]" in response.read().decode()
            took.append(time.perf_counter() - began)
        (connection,) = [made for made in live.server.server_state.connections if made.transport]
        raw = connection.transport.get_extra_info("socket")
        assert raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert statistics.median(took[1:]) < 0.02


def test_tokens_are_sent_as_they_come(text: Text) -> None:
    with serving(text, FakeFrontend(gap_s=0.05)) as live:
        arrivals: list[float] = []
        body = {"prompt": "hello world", "stream": True}
        with httpx.stream("POST", f"{live.url}/v1/completions", json=body) as response:
            arrivals.extend(time.perf_counter() for line in response.iter_lines() if line.startswith("data: {"))
        num_chunks = len(text.encode("hello world")) + 1
        assert arrivals[-1] - arrivals[0] > 0.05 * (num_chunks - 1) * 0.8


def test_the_api_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, diptych.serve.api; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=False).returncode == 0


def test_a_model_without_a_chat_template() -> None:
    with serving(Text(byte_level_tokenizer())) as live:
        error = assert_envelope(httpx.post(f"{live.url}/v1/chat/completions", json={"messages": HELLO}), 400)
        assert error["param"] == "messages"


# --- where the time went ---------------------------------------------------------------------------------------


def test_a_trace_comes_where_it_is_asked_for(text: Text) -> None:
    frontend = FakeFrontend()
    with serving(text, frontend) as server:
        url = f"{server.url}/v1/completions"
        body: dict[str, Any] = {"prompt": "hello world, this is a small model", "max_tokens": 4, "n": 2}
        plain = httpx.post(url, json=body).json()
        assert "diptych" not in plain
        asked = httpx.post(url, json=body, headers={"x-diptych-trace": "1"}).json()
        expected = [{"id": asked["id"], "index": index, "finish": "length"} for index in range(2)]
        assert asked["diptych"] == {"trace": expected}
        assert "diptych" not in httpx.post(url, json=body, headers={"x-diptych-trace": "0"}).json()
        for options, usage in (({}, False), ({"stream_options": {"include_usage": True}}, True)):
            lines = httpx.post(url, json=body | {"stream": True, "diptych_trace": True} | options).text.split("\n\n")
            assert lines[-2] == "data: [DONE]"
            last = json.loads(lines[-3].removeprefix("data: "))
            assert [record["finish"] for record in last["diptych"]["trace"]] == ["length"] * 2 and last["choices"] == []
            assert bool(last["usage"]) == usage
        assert "diptych" not in httpx.post(url, json=body | {"stream": True}).text
        noted = [note for note in frontend.notes if note.ident == asked["id"]]
        assert [note.index for note in noted] == [0, 1], "each once"
        for note in noted:
            assert note.ttft_s > note.api_s + note.leader_s + note.out_s > 0 and note.out_s >= 0


def test_requests_are_found_by_either_id(text: Text) -> None:
    with serving(text, FakeFrontend()) as server:
        body = {"prompt": "hello world", "max_tokens": 2}
        ids = [
            httpx.post(f"{server.url}/v1/completions", json=body, headers={"x-request-id": f"a/{i}"}).json()["id"]
            for i in range(3)
        ]
        assert httpx.get(f"{server.url}/requests/a/1").json()["requests"][0]["id"] == ids[1]
        assert httpx.get(f"{server.url}/requests/{ids[1]}").json()["id"] == ids[1]
        newest = httpx.get(f"{server.url}/requests?limit=2").json()["requests"]
        assert [found["id"] for found in newest] == ids[:0:-1]
        missing = httpx.get(f"{server.url}/requests/cmpl-unknown")
        assert missing.status_code == 404 and missing.json()["error"]["code"] == "request_not_found"
        for limit in ("0", "257", "x", "-1", "9" * 5000, "%C2%B2"):
            refused = httpx.get(f"{server.url}/requests?limit={limit}")
            assert refused.status_code == 400 and refused.json()["error"]["param"] == "limit", limit


def test_requests_want_the_key(text: Text) -> None:
    with serving(text, FakeFrontend(), Settings(api_key="secret")) as server:
        for path in ("/requests", "/requests/mine"):
            assert httpx.get(f"{server.url}{path}").status_code == 401


def test_a_router_that_does_not_say_costs_no_answer(text: Text) -> None:
    class Silent(FakeFrontend):
        async def records(self, name: str = "", limit: int = 1) -> list[dict[str, Any]]:
            raise Unavailable("the router does not answer")

    with serving(text, Silent()) as server:
        body = {"prompt": "hello world", "max_tokens": 2, "diptych_trace": True}
        reply = httpx.post(f"{server.url}/v1/completions", json=body)
        assert reply.status_code == 200 and reply.json()["diptych"] == {"trace": []}


def test_nobody_names_workers_offers_or_blocks_from_outside(live: Live) -> None:
    """Where KV lies and who reads it is never a client's word: such fields are like any that nobody knows."""
    body = {"prompt": "hello world", "max_tokens": 2}
    extra = {
        "kv_transfer_params": {"remote_engine_id": "p0", "remote_block_ids": [0, 1], "remote_host": "::1"},
        "offer": "AAAA", "rid": 64, "peer": "p0", "worker": "p0", "blocks": [0, 1], "hashes": ["00"], "root": "00",
    }  # fmt: skip
    for said in (body, body | extra):
        assert httpx.post(f"{live.url}/v1/completions", json=said).status_code == 200
    plain, named = live.frontend.jobs
    assert replace(named, sampling=plain.sampling, label=plain.label) == plain and replace(
        named.sampling, seed=plain.sampling.seed
    ) == (plain.sampling)


PAGE = "https://chat.example.org"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/embeddings", "/tokenize", "/workers/d0/drain"])
def test_a_body_is_json_or_says_nothing_of_what_it_is(live: Live, path: str, kind: str) -> None:
    error = assert_envelope(httpx.post(live.url + path, content=b"{}", headers={"content-type": kind}), 415)
    assert "application/json" in error["message"]
    for fine in ({}, {"content-type": "application/json; charset=utf-8"}, {"content-type": "application/x+json"}):
        assert httpx.post(live.url + path, content=b"{}", headers=fine).status_code in (202, 400)


def test_a_web_page_of_another_origin_gets_nothing(live: Live) -> None:
    url = f"{live.url}/workers/d0/drain"
    assert_envelope(httpx.post(url, headers={"origin": PAGE}), 403)
    assert_envelope(httpx.post(url, headers={"origin": "null"}), 403)
    assert httpx.post(url, headers={"origin": live.url}).status_code == 202
    asked = {"origin": PAGE, "access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    reply = httpx.options(f"{live.url}/v1/chat/completions", headers=asked)
    assert reply.status_code == 405 and "access-control-allow-origin" not in reply.headers


def test_origins_that_are_let_in(text: Text) -> None:
    """The browser's question before a request carries no key."""
    with serving(text, settings=Settings(cors_origins=(PAGE,), api_key="sesame")) as live:
        asked = {
            "origin": PAGE,
            "access-control-request-method": "POST",
            "access-control-request-headers": "content-type",
        }
        reply = httpx.options(f"{live.url}/v1/completions", headers=asked)
        assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (200, PAGE)
        other = httpx.options(f"{live.url}/v1/completions", headers=asked | {"origin": "https://other.org"})
        assert "access-control-allow-origin" not in other.headers
        headers = {"origin": PAGE, "authorization": "Bearer sesame"}
        body = {"prompt": "hello", "max_tokens": 2, "stream": True}
        got = httpx.post(f"{live.url}/v1/completions", json=body, headers=headers)
        assert (got.headers["access-control-allow-origin"], events(got)[-1]) == (PAGE, "[DONE]")
        assert httpx.post(f"{live.url}/workers/d0/drain", headers=headers).status_code == 202
