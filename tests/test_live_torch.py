"""The bundled model on a live disaggregated cluster: real tokens of a real model cross from one process to another."""

import asyncio
import json
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from clusters import answer_of, connected, live, settled
from reference import Reference

from diptych import LLM
from diptych.config import DEMO
from diptych.demo.notes import make_notes
from diptych.engine.executor import Sampling
from diptych.serve.build import cluster_card
from diptych.serve.frontend import Job
from diptych.serve.supervisor import Supervisor
from diptych.serve.text import Text, prompt_hashes

NUM_QUESTIONS = 60  # in each of the three recall tests; a held-out seed each


@pytest.fixture(scope="module")
def cluster() -> Iterator[Supervisor]:
    with live(prefill=1, decode=1, chunk=128) as supervisor:
        yield supervisor


@pytest.fixture(scope="module")
def client(cluster: Supervisor) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def question(seed: int, min_tokens: int = 520) -> tuple[str, str, str]:
    """Notes of at least so many tokens, a question about one of them, and the answer."""
    rng = random.Random(1_000_000 + seed)
    notes, pairs = make_notes(rng, min_tokens=min_tokens)
    asked, answer = rng.choice(pairs)
    return notes, asked, answer


def test_a_chat_streams_through_both_pools(client: openai.OpenAI, cluster: Supervisor) -> None:
    before = kv_bytes(cluster)
    stream = client.chat.completions.create(
        model="diptych-demo",
        messages=[{"role": "user", "content": "Tell me a story about a fox."}],
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert "fox" in text and len(text) > 60
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["stop"]
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens > 20
    assert kv_bytes(cluster) > before


def test_a_required_call_is_a_call_and_streams_as_one(client: openai.OpenAI) -> None:
    """A model that was never taught to call anything, held to a call by a grammar, across both pools."""
    pytest.importorskip("llguidance")
    city = {"enum": ["Berlin", "Köln"]}
    schema = {"type": "object", "properties": {"city": city, "day": {"enum": [1, 2]}}, "required": ["city", "day"]}
    how: dict[str, Any] = {
        "model": "diptych-demo",
        "messages": [{"role": "user", "content": "Tell me a story about a fox."}],
        "tools": [{"type": "function", "function": {"name": "weather", "parameters": schema}}],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "max_tokens": 300,
        "seed": 5,
    }
    whole = client.chat.completions.create(**how).choices[0]
    (call,) = whole.message.tool_calls or []
    assert (whole.finish_reason, whole.message.content, call.function.name) == ("tool_calls", None, "weather")
    assert set(json.loads(call.function.arguments)) == {"city", "day"}
    parts = [part for chunk in client.chat.completions.create(stream=True, **how) for part in chunk.choices]
    deltas = [delta for part in parts for delta in part.delta.tool_calls or []]
    assert "".join(delta.function.arguments for delta in deltas) == call.function.arguments
    assert len(deltas) > 3 and parts[-1].finish_reason == "tool_calls"


def test_a_request_says_where_its_time_went(cluster: Supervisor) -> None:
    """Asked for with a header, and found again by either of its ids: two waterfalls, each adding up exactly."""
    before = counted(cluster)
    notes, asked, _ = question(78)
    body: Any = {"prompt": f"{notes} {asked}", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    named = {"x-diptych-trace": "1", "x-request-id": "where-time-goes"}
    reply = httpx.post(f"{cluster.url}/v1/completions", json=body, headers=named).json()
    (record,) = reply["diptych"]["trace"]
    for name in ("where-time-goes", reply["id"]):
        (found,) = httpx.get(f"{cluster.url}/requests/{name}").json()["requests"]
        assert found | {"age_s": 0} == record | {"age_s": 0}
    for waterfall in (record["ttft"], record["handover"]):
        assert sum(waterfall["parts"].values()) == waterfall["us"] and min(waterfall["parts"].values()) >= 0
    assert (record["ttft"]["seen_by"], record["state"], record["output_tokens"]) == ("api", "length", 8)
    assert record["ttft"]["parts"]["prefill"] > 0 and record["handover"]["parts"]["step"] > 0
    (attempt,) = record["attempts"]
    assert attempt["computed_tokens"] + record["cached_tokens"] == record["prompt_tokens"]
    assert attempt["steps"] >= attempt["computed_tokens"] / 128
    transfer = record["transfer"]
    assert (transfer["source"], transfer["target"], transfer["lane"], transfer["codec"]) == ("p0", "d0", "shm", "raw")
    assert transfer["bytes"] > 0 and transfer["reads"] > 0 and transfer["failed"] == 0
    assert transfer["us"] > 0 and transfer["exposed_us"] <= record["handover"]["us"]
    after = counted(cluster)
    assert all(after[name] >= value for name, value in before.items())
    exposed = 'diptych_kv_transfer_seconds_count{kind="exposed"}'
    assert after[exposed] == before[exposed] + 1
    way = 'diptych_kv_transfer_bytes_total{lane="shm",purpose="handover",source="p0",target="d0"}'
    assert after[way] >= before.get(way, 0) + transfer["bytes"]


def counted(cluster: Supervisor) -> dict[str, float]:
    """Every counter of a scrape, by its name and labels as they are written."""
    lines = [line.rsplit(" ", 1) for line in httpx.get(f"{cluster.url}/metrics").text.splitlines() if line[0] != "#"]
    ends = ("_total", "_count", "_bucket")
    return {name: float(value) for name, value in lines if name.partition("{")[0].endswith(ends)}


def kv_bytes(cluster: Supervisor) -> int:
    """Bytes of KV that decode workers have read from prefill workers."""
    rows = httpx.get(f"{cluster.url}/workers").json()["workers"]
    return sum(row["kv"]["bytes"] for row in rows)


def test_completions_with_and_without_streaming_agree(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="diptych-demo", prompt="The code of", max_tokens=20, temperature=0)
    parts = client.completions.create(
        model="diptych-demo", prompt="The code of", max_tokens=20, temperature=0, stream=True
    )
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
    assert whole.usage is not None and whole.usage.completion_tokens <= 20


def test_several_answers_compute_their_prompt_once(client: openai.OpenAI) -> None:
    """Through both pools: the siblings' prompt is found, their seeds differ, and every token has its probability."""
    notes, asked, _ = question(77)
    body: Any = {"model": "diptych-demo", "prompt": f"{notes} {asked}", "max_tokens": 8, "temperature": 1, "seed": 5}
    one = client.completions.create(**body, n=1, logprobs=2)
    three = client.completions.create(**body, n=3, logprobs=2, extra_body={"ignore_eos": True})
    assert [choice.index for choice in three.choices] == [0, 1, 2]
    assert len({choice.text for choice in three.choices}) > 1
    assert three.usage.prompt_tokens == one.usage.prompt_tokens
    assert three.usage.prompt_tokens_details.cached_tokens >= one.usage.prompt_tokens - 16
    assert one.choices[0].text == three.choices[0].text[: len(one.choices[0].text)]
    for choice in three.choices:
        assert len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs) == 8
        assert all(value <= 0 for value in choice.logprobs.token_logprobs)


def test_an_echoed_prompt_is_scored_by_whoever_computes_it(client: openai.OpenAI, cluster: Supervisor) -> None:
    """Twice the same: a cached prefix must not swallow probabilities."""
    text = " ".join(["The fox ran over the hill."] * 30)
    body: Any = {"model": "diptych-demo", "prompt": text, "max_tokens": 1, "logprobs": 1, "echo": True}
    first, again = (client.completions.create(**body, temperature=0).choices[0] for _ in range(2))
    assert first.text.startswith(text)
    values = first.logprobs.token_logprobs
    assert values[0] is None and len(values) == 1 + len(Text.load(Path(DEMO)).encode(text))
    assert again.logprobs.token_logprobs[1:] == pytest.approx(values[1:], abs=1e-4)


def test_an_answer_keeps_to_its_grammar(client: openai.OpenAI) -> None:
    pytest.importorskip("llguidance")
    body: Any = {"model": "diptych-demo", "messages": [{"role": "user", "content": "Is a fox an animal?"}]}
    for seed in range(3):
        reply = client.chat.completions.create(**body, seed=seed, extra_body={"guided_choice": ["yes", "no", "né"]})
        assert reply.choices[0].message.content in ("yes", "no", "né")
        assert reply.choices[0].finish_reason == "stop"


def test_fields_of_vllm_are_heeded(client: openai.OpenAI) -> None:
    """On both sides of a handover: which tokens there may be, where a chat goes on, and what ends a text."""
    text = Text.load(Path(DEMO))
    only = text.encode(" the fox dog")
    extra: Any = {"allowed_token_ids": only, "return_token_ids": True}
    one = client.completions.create(model="diptych-demo", prompt="The", max_tokens=8, extra_body=extra).choices[0]
    assert set(one.token_ids) <= set(only) and len(one.token_ids) == 8  # type: ignore[attr-defined]
    told: list[Any] = [{"role": "user", "content": "Tell me a story about a fox."}]
    body: Any = {"model": "diptych-demo", "temperature": 0, "max_tokens": 12}
    whole = client.chat.completions.create(**body, messages=told).choices[0].message.content
    assert whole is not None
    said = " ".join(whole.split()[:4])
    again = client.chat.completions.create(
        **body, messages=[*told, {"role": "assistant", "content": said}], extra_body={"continue_final_message": True}
    )
    assert whole.startswith(said) and (said + (again.choices[0].message.content or "")).startswith(whole)
    word = whole.split()[3]
    for kept in (True, False):
        stopped = client.chat.completions.create(
            **body, messages=told, stop=word, extra_body={"include_stop_str_in_output": kept}
        ).choices[0]
        assert (stopped.message.content or "").endswith(word) == kept
        assert stopped.stop_reason == word  # type: ignore[attr-defined]


def test_live_tokens_equal_generate(cluster: Supervisor) -> None:
    """Invariant 8 through real processes: eight concurrent requests of 1 to 700 prompt tokens, 64 new ones each."""
    reference = Reference(DEMO)
    card = cluster_card(cluster.cluster)
    rng = random.Random(5)
    vocab = card.vocab_size
    prompts = [[rng.randrange(5, vocab) for _ in range(n)] for n in (1, 2, 16, 17, 130, 300, 512, 700)]

    async def run() -> list[list[int]]:
        async with connected(cluster) as frontend:
            streams = []
            for prompt in prompts:
                root, hashes = prompt_hashes(prompt, card)
                streams.append(frontend.submit(Job(prompt, 64, Sampling(), root=root, hashes=hashes))[1])
            answers = await asyncio.gather(*(answer_of(stream) for stream in streams))
            await settled(frontend)
            return [tokens for tokens, _ in answers]

    for prompt, tokens in zip(prompts, asyncio.run(run()), strict=True):
        reference.check(reference.greedy(prompt, 64), tokens, f"live, {len(prompt)} prompt tokens")
    assert reference.num_ties <= 1


@pytest.mark.parametrize("min_tokens", [520, 700, 1000])
def test_recall_through_the_server(client: openai.OpenAI, min_tokens: int) -> None:
    """The answer is in the prompt, hundreds of tokens back: it can only be right if that KV is the one that crossed."""

    def ask(seed: int) -> bool:
        notes, asked, answer = question(seed + min_tokens, min_tokens)
        reply = client.chat.completions.create(
            model="diptych-demo",
            messages=[{"role": "user", "content": f"{notes} {asked}"}],
            temperature=0,
            max_tokens=24,
        )
        assert reply.usage is not None and reply.usage.prompt_tokens >= min_tokens
        return reply.choices[0].message.content == answer

    with ThreadPoolExecutor(4) as pool:
        right = sum(pool.map(ask, range(NUM_QUESTIONS)))
    assert right >= 0.95 * NUM_QUESTIONS, f"{right} of {NUM_QUESTIONS}"


@pytest.mark.parametrize("zeroed", [False, True])
def test_recall_needs_the_pages_that_crossed(zeroed: bool) -> None:
    """The same handover in one process; with the transferred pages zeroed, recall falls to chance."""
    right = 0
    with LLM("demo", prefill=1, decode=1, kv_memory="16MiB") as llm:
        for seed in range(20):
            right += recall_once(llm, seed, zeroed)
    assert right >= 19 if not zeroed else right <= 1


def recall_once(llm: LLM, seed: int, zeroed: bool) -> bool:
    """Ask one question; where told so, wipe what the decode side has read before it decodes."""
    notes, asked, answer = question(seed)
    tokens = llm.text.encode_chat([{"role": "user", "content": f"{notes} {asked}"}])
    decode = llm.cluster.workers["d0"]
    before = decode.traffic.num_transfers
    how = Sampling(stop_ids=llm.cluster.card.stop_ids)
    given = llm.cluster.submit(tokens, 24, how)
    while len(given.tokens) < 2:
        assert llm.cluster.step()
        if zeroed and decode.traffic.num_transfers > before and not decode.policy.running:
            llm.cluster.parts["d0"].pool.view[:] = 0
    llm.cluster.run_until([given])
    llm.cluster.settle()
    return llm.text.decode(given.tokens) == answer


def test_a_kept_alive_connection_has_no_hiccup(cluster: Supervisor) -> None:
    """The second request on a connection must not wait for a delayed acknowledgement (40 ms and more)."""
    body = {"model": "diptych-demo", "prompt": "The fox", "max_tokens": 2, "temperature": 0}

    def median(posts: Iterable[Callable[..., httpx.Response]]) -> float:
        waits = []
        for post in posts:
            began = time.perf_counter()
            assert post(f"{cluster.url}/v1/completions", json=body).status_code == 200
            waits.append(time.perf_counter() - began)
        return statistics.median(waits)

    with httpx.Client() as kept:
        kept.post(f"{cluster.url}/v1/completions", json=body)
        reused = median([kept.post] * 10)
    clients = [httpx.Client() for _ in range(10)]
    fresh = median([client.post for client in clients])
    for client in clients:
        client.close()
    assert reused < fresh + 0.02, f"{reused:.3f} s on a kept connection, {fresh:.3f} s on a fresh one"


def test_a_client_that_leaves_frees_its_blocks(cluster: Supervisor) -> None:
    """Streaming and not, during prefill and while decoding: nothing stays behind on any worker."""
    body = {"model": "diptych-demo", "prompt": "The fox", "max_tokens": 3000, "temperature": 1, "ignore_eos": True}
    with httpx.Client(base_url=cluster.url) as http:
        for read in (0, 3):
            with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
                lines = response.iter_lines()
                for _ in range(read):
                    next(lines)
        with pytest.raises(httpx.ReadTimeout):
            http.post("/v1/completions", json=body, timeout=0.3)

    async def wait() -> None:
        async with connected(cluster) as frontend:
            await settled(frontend)

    asyncio.run(wait())


def test_bad_requests_cost_no_prefill(cluster: Supervisor) -> None:
    rows = httpx.get(f"{cluster.url}/workers").json()["workers"]
    steps = {row["id"]: row["steps"] for row in rows}
    bad = [
        ({"prompt": "x", "max_tokens": 0}, 400),
        ({"prompt": "x", "max_tokens": 10**9}, 400),
        ({"prompt": "word " * 20000}, 400),
        ({"prompt": "x", "model": "nobody"}, 404),
        ({"prompt": "x", "temperature": -1}, 400),
        ({}, 400),
    ]
    for body, status in bad:
        reply = httpx.post(f"{cluster.url}/v1/completions", json=body)
        assert reply.status_code == status and reply.json()["error"]["message"]
    rows = httpx.get(f"{cluster.url}/workers").json()["workers"]
    assert steps == {row["id"]: row["steps"] for row in rows}


def test_offline_chat() -> None:
    with LLM("demo", prefill=1, decode=1, kv_memory="16MiB") as llm:
        assert "fox" in llm.chat([{"role": "user", "content": "Tell me a story about a fox."}]).text
        one, two = llm.generate(["The code of", "Hello"], max_tokens=4)
        assert len(one.tokens) <= 4 and isinstance(two.text, str)


def test_the_bundled_tokenizer_needs_no_torch() -> None:
    assert Text.load(Path(DEMO)).encode_chat([{"role": "user", "content": "Hello"}])
