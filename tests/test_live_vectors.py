"""Vectors and scores from real processes: transformers' own numbers, and no decode worker hears of them."""

import asyncio
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
import transformers
from checkpoints import make_checkpoint
from clusters import answer_of, connected, live, settled

from diptych import LLM
from diptych.config import DEMO
from diptych.engine.executor import Sampling
from diptych.engine.paced import oracle, vector_oracle
from diptych.errors import BadRequest
from diptych.journal import read_journals
from diptych.policy.messages import Reason
from diptych.serve.build import cluster_card
from diptych.serve.frontend import Job
from diptych.serve.supervisor import Supervisor
from diptych.serve.text import prompt_hashes
from diptych.sim.replay import replay

ROOT = Path(__file__).parent.parent
QUERY = "The fox"
TEXTS = ["A fox ran over the hill.", "The code of the red door.", "The fox " * 100, "x"]
PACED = """
engine = "paced"
kv_memory = "160KiB"        # 160 blocks of 16 tokens
chunk = 64
[paced]
base_ms = 2.0
new_token_us = 20
vocab = 300
[[worker]]
role = "prefill"
count = 2
[[worker]]
role = "decode"
"""


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What workers say of themselves, but for how long ago they last computed."""
    return [{key: value for key, value in row.items() if key != "last_step_s"} for row in rows]


def decode_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What decode workers say of themselves, blocks, steps and reads included."""
    return timeless([row for row in rows if row["role"] == "decode"])


# --- the bundled model ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[Supervisor]:
    with live(prefill=1, decode=1, chunk=64) as supervisor:
        yield supervisor


def expected(texts: list[str], pooling: str) -> list[Any]:
    """Normalised, from `AutoModel` over the bundled checkpoint."""
    model = transformers.AutoModel.from_pretrained(DEMO, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO)
    found = []
    for text in texts:
        with torch.inference_mode():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        found.append(torch.nn.functional.normalize(states.mean(0) if pooling == "mean" else states[-1], dim=0))
    return found


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_embeddings_are_transformers_own(cluster: Supervisor, pooling: str) -> None:
    """Through the openai client; twice, so that prefixes are found; and the decode worker's books stay as they were."""
    before = httpx.get(f"{cluster.url}/workers").json()["workers"]
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0) as client:
        extra = {"pooling": pooling}
        replies = [client.embeddings.create(model="diptych-demo", input=TEXTS, extra_body=extra).data for _ in range(2)]
    for reply in replies:
        for ours, theirs in zip(reply, expected(TEXTS, pooling), strict=True):
            assert ours.embedding == pytest.approx(theirs.tolist(), abs=1e-4)
    after = httpx.get(f"{cluster.url}/workers").json()["workers"]
    assert decode_rows(after) == decode_rows(before)
    steps = [{row["id"]: row["steps"] for row in rows} for rows in (before, after)]
    assert steps[1]["p0"] > steps[0]["p0"] and steps[1]["d0"] == steps[0]["d0"]


def test_scores_and_rerankings_are_cosines(cluster: Supervisor) -> None:
    query, *others = expected([QUERY, *TEXTS], "last")
    cosines = [float(query @ other) for other in others]
    before = httpx.get(f"{cluster.url}/workers").json()["workers"]
    got = httpx.post(f"{cluster.url}/v1/score", json={"text_1": QUERY, "text_2": TEXTS}).json()
    assert [each["score"] for each in got["data"]] == pytest.approx(cosines, abs=1e-4)
    ranked = httpx.post(f"{cluster.url}/v1/rerank", json={"query": QUERY, "documents": TEXTS}).json()["results"]
    assert [each["index"] for each in ranked] == sorted(range(len(TEXTS)), key=lambda i: -cosines[i])
    assert decode_rows(httpx.get(f"{cluster.url}/workers").json()["workers"]) == decode_rows(before)


def test_bad_requests_cost_no_prefill(cluster: Supervisor) -> None:
    rows = httpx.get(f"{cluster.url}/workers").json()["workers"]
    for path, body, status in (
        ("embeddings", {"input": ""}, 400),
        ("embeddings", {"input": "word " * 20000}, 400),
        ("embeddings", {"input": ["a"] * 3000}, 400),
        ("embeddings", {"input": "a", "dimensions": 7}, 400),
        ("embeddings", {"input": "a", "model": "nobody"}, 404),
        ("rerank", {"query": "a"}, 400),
        ("classify", {"input": "a"}, 400),
    ):
        reply = httpx.post(f"{cluster.url}/v1/{path}", json=body)
        assert reply.status_code == status and reply.json()["error"]["message"]
    assert timeless(httpx.get(f"{cluster.url}/workers").json()["workers"]) == timeless(rows)


def test_the_example_runs(cluster: Supervisor) -> None:
    command = [sys.executable, str(ROOT / "examples/embeddings.py"), "--url", cluster.url]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert "128 numbers each" in said and "closest: " in said


def test_offline() -> None:
    wanted = expected([QUERY, *TEXTS], "last")
    with LLM("demo", prefill=1, decode=1, kv_memory="16MiB") as llm:
        assert llm.embed(QUERY) == pytest.approx(wanted[0].numpy(), abs=1e-4)
        for ours, theirs in zip(llm.embed(TEXTS, pooling="mean"), expected(TEXTS, "mean"), strict=True):
            assert ours == pytest.approx(theirs.numpy(), abs=1e-4)
        assert llm.score(QUERY, TEXTS) == pytest.approx([float(wanted[0] @ other) for other in wanted[1:]], abs=1e-4)
        assert llm.cluster.workers["d0"].num_steps == 0
        for bad in ("", [], ["a", ""], "word " * 20000):
            with pytest.raises(BadRequest):
                llm.embed(bad)


# --- a cross-encoder -----------------------------------------------------------------------------------------------


def test_a_cross_encoder_is_transformers_own(tmp_path: Path) -> None:
    """A random Qwen3ForSequenceClassification with the bundled tokenizer: pairs through the tokenizer, then sigmoid."""
    folder = make_checkpoint("qwen3", tmp_path, seed=4, task="classify", num_labels=1, vocab_size=2048)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        pairs = [tokenizer(QUERY, text, return_tensors="pt") for text in TEXTS]
        wanted = [float(model(input_ids=pair["input_ids"]).logits.sigmoid()) for pair in pairs]
    assert max(wanted) - min(wanted) > 0.05, "texts that all have one score prove little"
    with live(model=str(folder), prefill=1, decode=1, chunk=32) as supervisor:
        before = httpx.get(f"{supervisor.url}/workers").json()["workers"]
        got = httpx.post(f"{supervisor.url}/v1/score", json={"text_1": QUERY, "text_2": TEXTS}).json()
        assert [each["score"] for each in got["data"]] == pytest.approx(wanted, abs=1e-4)
        ranked = httpx.post(f"{supervisor.url}/v2/rerank", json={"query": QUERY, "documents": TEXTS}).json()["results"]
        assert [each["index"] for each in ranked] == sorted(range(len(TEXTS)), key=lambda i: -wanted[i])
        assert decode_rows(httpx.get(f"{supervisor.url}/workers").json()["workers"]) == decode_rows(before)
        refused = httpx.post(f"{supervisor.url}/v1/completions", json={"prompt": "a"})
        assert refused.status_code == 400 and "cannot write text" in refused.json()["error"]["message"]


# --- paced processes: every page is re-read for every vector -----------------------------------------------------


def job_of(supervisor: Supervisor, rng: random.Random, silent: bool) -> Job:
    prompt = [rng.randrange(300) for _ in range(rng.randint(1, 300))]
    root, hashes = prompt_hashes(prompt, cluster_card(supervisor.cluster))
    if silent:
        return Job(prompt, 0, Sampling(pooling=rng.choice(("last", "mean"))), root=root, hashes=hashes)
    return Job(prompt, 40, Sampling(), root=root, hashes=hashes)


async def vector_of(stream: Any) -> bytes:
    chunk = await stream.get()
    assert chunk.error is None and chunk.reason == Reason.COMPUTED and not chunk.tokens, chunk
    return bytes(chunk.vector)


def test_vectors_survive_the_death_of_their_worker_and_a_decode_worker_hears_nothing(tmp_path: Path) -> None:
    topology, journal = tmp_path / "cluster.toml", tmp_path / "journal"
    topology.write_text(PACED)

    async def check(supervisor: Supervisor, jobs: list[Job], streams: list[Any]) -> None:
        model = supervisor.cluster.paced
        for job, stream in zip(jobs, streams, strict=True):
            if job.max_new:
                assert (await asyncio.wait_for(answer_of(stream), 30))[0] == oracle(job.tokens, 40, model)
            else:
                wanted = vector_oracle(job.tokens, model, job.sampling.pooling)
                assert await asyncio.wait_for(vector_of(stream), 30) == wanted

    async def run(supervisor: Supervisor) -> None:
        rng = random.Random(9)
        async with connected(supervisor) as frontend:
            before = await settled(frontend)
            jobs = [job_of(supervisor, rng, silent=True) for _ in range(200)]
            streams = [frontend.submit(job)[1] for job in jobs]
            await asyncio.sleep(0.1)
            (row,) = [row for row in await frontend.workers() if row["id"] == "p1"]
            os.kill(row["pid"], signal.SIGKILL)
            await check(supervisor, jobs, streams)
            assert decode_rows(await settled(frontend)) == decode_rows(before)
            _, report = await frontend.health()
            assert report["totals"]["finished"] == 200 and report["broken_streams"] == 0
            jobs = [job_of(supervisor, rng, silent=i % 2 == 0) for i in range(60)]
            request, _ = frontend.submit(jobs[0])
            frontend.cancel(request)
            await check(supervisor, jobs, [frontend.submit(job)[1] for job in jobs])
            await settled(frontend)

    with live(topology, journal=str(journal)) as supervisor:
        asyncio.run(run(supervisor))
    for recording in read_journals(journal):
        outcome = replay(recording)
        assert outcome.difference is None, outcome.difference
