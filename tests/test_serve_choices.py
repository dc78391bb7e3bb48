"""What choices carry beside their text: several of them, log-probabilities, echoes, token ids, usage as it grows."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from serve_doubles import FakeFrontend, Live, byte_level_tokenizer, scoring_echo, serving

from diptych.engine.executor import Score
from diptych.policy.messages import Reason
from diptych.serve.frontend import Chunk, Job
from diptych.serve.text import Text

TEXT = Text(byte_level_tokenizer())
PROMPT = "hello world, né"
LONG = "hello world, the quick brown fox jumps over the lazy dog " * 3


@pytest.fixture(scope="module")
def shared() -> Iterator[Live]:
    with serving(TEXT, FakeFrontend(scoring_echo)) as live:
        yield live


@pytest.fixture
def live(shared: Live) -> Live:
    shared.frontend.jobs.clear()
    return shared


@pytest.fixture
def client(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="-", max_retries=0, timeout=10) as made:
        yield made


def post(live: Live, **body: Any) -> dict[str, Any]:
    reply = httpx.post(f"{live.url}/v1/completions", json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def stream(live: Live, path: str = "/v1/completions", **body: Any) -> list[dict[str, Any]]:
    reply = httpx.post(live.url + path, json={**body, "stream": True})
    *events, done = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line]
    assert done == "[DONE]"
    return [json.loads(event) for event in events]


# --- several answers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True])
def test_n_answers_are_numbered_and_have_a_seed_each(client: openai.OpenAI, live: Live, streamed: bool) -> None:
    got = client.completions.create(model="tiny", prompt=[LONG, PROMPT], n=3, seed=7, max_tokens=500, stream=streamed)
    said: dict[int, str] = {}
    for chunk in got if streamed else [got]:
        for choice in chunk.choices:
            said[choice.index] = said.get(choice.index, "") + choice.text
    assert [said[i] for i in range(6)] == [LONG] * 3 + [PROMPT] * 3
    seeds = [(job.tokens, job.sampling.seed) for job in live.frontend.jobs]
    assert sorted(seeds) == sorted((TEXT.encode(text), seed) for text in (LONG, PROMPT) for seed in (7, 8, 9))


def test_siblings_wait_until_the_prompt_is_computed() -> None:
    """The others are handed in when the first has written a token: then its prompt is in the prefix cache."""
    open_at_first_token: list[int] = []
    frontend = FakeFrontend()

    def answer(job: Job) -> Iterator[Chunk]:
        open_at_first_token.append(len(frontend.jobs))
        yield from scoring_echo(job)

    frontend.answer = answer
    with serving(TEXT, frontend) as live:
        got = post(live, prompt=LONG, n=3, max_tokens=5)
        assert open_at_first_token == [1, 3, 3]
        assert [choice["index"] for choice in got["choices"]] == [0, 1, 2]
        num = len(TEXT.encode(LONG))
        assert got["usage"]["prompt_tokens"] == num, "one prompt, however many answers"
        assert got["usage"]["completion_tokens"] == 15
        assert got["usage"]["prompt_tokens_details"] == {"cached_tokens": 16}
        metrics = httpx.get(f"{live.url}/metrics").text
        assert "diptych_request_max_num_generation_tokens_sum 5.0" in metrics, "the longest of them, once"


def test_a_refusal_of_the_first_is_the_answer_to_all() -> None:
    def full(job: Job) -> Iterator[Chunk]:
        yield Chunk([], error=(429, "full"))

    with serving(TEXT, FakeFrontend(full)) as live:
        reply = httpx.post(f"{live.url}/v1/completions", json={"prompt": LONG, "n": 3})
        assert reply.status_code == 429
        assert len(live.frontend.jobs) == 1
        assert "diptych_requests_running 0.0" in httpx.get(f"{live.url}/metrics").text


# --- log-probabilities -----------------------------------------------------------------------------------------


def test_chat_logprobs() -> None:
    body: Any = {"messages": [{"role": "user", "content": "x"}], "logprobs": True, "max_tokens": 100}
    with (
        serving(Text(TEXT.tokenizer, chat=_Plain()), FakeFrontend(scoring_echo)) as live,
        openai.OpenAI(base_url=f"{live.url}/v1", api_key="-") as chat,
    ):
        got = chat.chat.completions.create(model="tiny", top_logprobs=2, **body)
        content = got.choices[0].logprobs.content
        assert b"".join(bytes(entry.bytes) for entry in content).decode() == PROMPT
        assert [len(entry.top_logprobs) for entry in content] == [2] * len(content)
        assert content[0].logprob == -0.5
        chunks = chat.chat.completions.create(model="tiny", stream=True, **body)
        entries = [e for c in chunks if c.choices[0].logprobs for e in c.choices[0].logprobs.content]
        assert [entry.token for entry in entries] == [entry.token for entry in content]
        assert entries[0].top_logprobs == []


class _Plain:
    """A chat template that always says PROMPT."""

    source = PROMPT

    def render(self, *args: Any, **ending: Any) -> str:
        return PROMPT


@pytest.mark.parametrize("streamed", [False, True])
def test_completion_logprobs(live: Live, streamed: bool) -> None:
    body = {"prompt": PROMPT, "logprobs": 2, "max_tokens": 100}
    choices = [e["choices"][0] for e in stream(live, **body)] if streamed else post(live, **body)["choices"]
    found = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    tokens = [token for piece in found for token in piece["tokens"]]
    offsets = [offset for piece in found for offset in piece["text_offset"]]
    assert tokens == [TEXT.token(i) for i in TEXT.encode(PROMPT)]
    assert offsets == [sum(map(len, tokens[:n])) for n in range(len(tokens))]
    assert {value for piece in found for value in piece["token_logprobs"]} == {-0.5}
    assert all(2 <= len(top) <= 3 for piece in found for top in piece["top_logprobs"])


def test_nobody_asked(live: Live) -> None:
    assert post(live, prompt=PROMPT)["choices"][0]["logprobs"] is None
    assert live.frontend.jobs[0].sampling.logprobs == -1


# --- echo ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("prompt", [PROMPT, TEXT.encode(PROMPT)], ids=["text", "ids"])
def test_echo(live: Live, prompt: Any, streamed: bool) -> None:
    body = {"prompt": prompt, "echo": True, "max_tokens": 100}
    choices = [e["choices"][0] for e in stream(live, **body)] if streamed else post(live, **body)["choices"]
    assert "".join(choice["text"] for choice in choices) == PROMPT * 2


@pytest.mark.parametrize("streamed", [False, True])
def test_echo_with_logprobs_is_what_evaluations_ask_for(live: Live, streamed: bool) -> None:
    """lm-evaluation-harness: `echo`, `logprobs: 1`, one token; the first has no probability."""
    body = {"prompt": LONG, "echo": True, "logprobs": 1, "max_tokens": 1}
    choices = [e["choices"][0] for e in stream(live, **body)] if streamed else post(live, **body)["choices"]
    found = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    num = len(TEXT.encode(LONG))
    assert "".join(token for piece in found for token in piece["tokens"][:num]).startswith(LONG)
    assert [v for piece in found for v in piece["token_logprobs"]] == [None] + [-0.5] * num
    assert found[0]["top_logprobs"][0] is None
    (job,) = live.frontend.jobs
    assert job.hashes == (), "a prefix that was found would have no probabilities"
    assert job.sampling.prompt_logprobs == 1


def test_the_prompt_alone(live: Live) -> None:
    got = post(live, prompt=PROMPT, echo=True, max_tokens=0, logprobs=0)
    (choice,) = got["choices"]
    assert choice["text"] == PROMPT
    assert len(choice["logprobs"]["tokens"]) == len(TEXT.encode(PROMPT))
    assert got["usage"]["completion_tokens"] == 0
    assert live.frontend.jobs[0].max_new == 1


# --- token ids, steps and usage --------------------------------------------------------------------------------


def test_token_ids(live: Live) -> None:
    ids = TEXT.encode(PROMPT)
    body = {"prompt": PROMPT, "return_token_ids": True, "max_tokens": 100}
    (choice,) = post(live, **body)["choices"]
    assert choice["token_ids"] == ids
    assert choice["prompt_token_ids"] == ids
    choices = [event["choices"][0] for event in stream(live, **body)]
    assert choices[0]["prompt_token_ids"] == ids
    assert [i for choice in choices for i in choice.get("token_ids", ())] == ids
    assert sum("prompt_token_ids" in choice for choice in choices) == 1
    assert "token_ids" not in post(live, prompt=PROMPT)["choices"][0]


def test_token_ids_of_a_chat_stand_beside_the_choices() -> None:
    with serving(Text(TEXT.tokenizer, chat=_Plain()), FakeFrontend(scoring_echo)) as live:
        body = {"messages": [{"role": "user", "content": "x"}], "return_token_ids": True}
        got = httpx.post(f"{live.url}/v1/chat/completions", json=body).json()
        assert got["prompt_token_ids"] == got["choices"][0]["token_ids"] == TEXT.encode(PROMPT)
        first, *_ = stream(live, "/v1/chat/completions", **body)
        assert first["prompt_token_ids"] == TEXT.encode(PROMPT)


def test_every_step_is_an_event_also_where_it_adds_no_text(live: Live) -> None:
    ids = TEXT.encode("🦊")
    assert len(ids) > 1
    texts = [event["choices"][0]["text"] for event in stream(live, prompt="🦊", max_tokens=100)]
    assert texts == ["", "", "", "🦊", ""][-len(ids) - 1 :]


def test_usage_as_it_grows(live: Live) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *events, last = stream(live, prompt=PROMPT, max_tokens=100, stream_options=options)
    num = len(TEXT.encode(PROMPT))
    assert [event["usage"]["completion_tokens"] for event in events] == [*range(1, num + 1), num]
    assert {event["usage"]["prompt_tokens"] for event in events} == {num}
    assert last["choices"] == []
    assert last["usage"] == events[-1]["usage"]
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 16}


def test_without_special_tokens(live: Live) -> None:
    post(live, prompt=PROMPT, add_special_tokens=False)
    assert live.frontend.jobs[0].tokens == TEXT.encode(PROMPT, add_special=False)


def test_the_reason_comes_with_the_last_event(live: Live) -> None:
    *steps, last = stream(live, prompt=PROMPT, max_tokens=3)
    assert [step["choices"][0]["finish_reason"] for step in steps] == [None] * 3
    assert last["choices"][0]["finish_reason"] == Reason.LENGTH


def ranking(job: Job) -> Iterator[Chunk]:
    """A model whose answers are the surer, the higher the seed's last digit; each says that digit."""
    digit = job.sampling.seed % 10
    for token in TEXT.encode(str(digit)):
        values = np.array([-1.0 / (1 + digit)], np.float32).tobytes()
        yield Chunk([token], scores=(Score(1, np.array([token], np.int32).tobytes(), values),))
    yield Chunk([], Reason.LENGTH)


@pytest.mark.parametrize("logprobs", [None, 0])
def test_the_best_of_several(logprobs: int | None) -> None:
    """By mean log-probability, whether or not it is shown; all of them are paid for."""
    with (
        serving(TEXT, FakeFrontend(ranking)) as live,
        openai.OpenAI(base_url=f"{live.url}/v1", api_key="-") as client,
    ):
        got = client.completions.create(
            model="tiny", prompt=["a", "b"], n=2, best_of=4, seed=100, max_tokens=5, logprobs=logprobs
        )
        assert [(choice.index, choice.text) for choice in got.choices] == [(0, "3"), (1, "2"), (2, "3"), (3, "2")]
        assert [choice.logprobs is None for choice in got.choices] == [logprobs is None] * 4
        assert got.usage and got.usage.completion_tokens == 8
        for wrong in ({"best_of": 1, "n": 2}, {"best_of": 2, "stream": True}):
            with pytest.raises(openai.BadRequestError, match="best_of"):
                client.completions.create(model="tiny", prompt="a", **wrong)  # type: ignore[call-overload]
