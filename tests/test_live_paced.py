"""A paced cluster of eight worker processes under load: equal tokens prove that every page arrived whole.

Pools are small enough that decode memory fills, and a tenth of the requests are cancelled at random moments.
"""

import asyncio
import os
import random
from pathlib import Path
from typing import Any

import httpx
from clusters import connected, live, settled

from diptych.engine.executor import Sampling
from diptych.engine.paced import PacedModel, oracle
from diptych.journal import read_journals
from diptych.policy.messages import Reason
from diptych.serve.api_process import RouterFrontend
from diptych.serve.build import cluster_card
from diptych.serve.frontend import Job
from diptych.serve.supervisor import Supervisor
from diptych.serve.text import prompt_hashes
from diptych.sim.replay import replay

MODEL = os.environ.get("TM", "demo")
NUM_REQUESTS = 2000
CONCURRENCY = 160
CANCELLED_SHARE = 0.1

TOPOLOGY = """
engine = "paced"
kv_memory = "160KiB"        # 160 blocks of 16 tokens
chunk = 128
[router]
policy = "least-loaded"
[paced]
base_ms = 1.0
new_token_us = 10
context_token_us = 0.02
vocab = 300
[[worker]]
role = "prefill"
count = 4
[[worker]]
role = "decode"
count = 4
"""


class Load:
    """Many requests at once, each checked against the oracle."""

    def __init__(self, supervisor: Supervisor, frontend: RouterFrontend, seed: int):
        self.model: PacedModel = supervisor.cluster.paced
        self.card = cluster_card(supervisor.cluster)
        self.frontend = frontend
        self.rng = random.Random(seed)
        self.shared = [self.tokens(200) for _ in range(8)]
        self.gate = asyncio.Semaphore(CONCURRENCY)
        self.num_finished = self.num_cancelled = 0

    def tokens(self, count: int) -> list[int]:
        return [self.rng.randrange(300) for _ in range(count)]

    def job(self) -> Job:
        """A prompt of 1 to 500 tokens, one in three behind a shared prefix."""
        prompt = self.tokens(self.rng.randint(1, 300))
        if self.rng.random() < 1 / 3:
            prompt = self.rng.choice(self.shared)[: self.rng.randint(1, 200)] + prompt
        root, hashes = prompt_hashes(prompt, self.card)
        return Job(prompt, self.rng.randint(1, 80), Sampling(), self.rng.choice((0, 0, 0, 1)), root, hashes)

    async def run(self) -> None:
        jobs = [self.job() for _ in range(NUM_REQUESTS)]
        cancels = [self.rng.random() < CANCELLED_SHARE for _ in jobs]
        delays = [self.rng.random() * self.rng.choice((0.01, 0.1, 0.5, 1.0)) for _ in jobs]
        await asyncio.gather(*(self.one(*each) for each in zip(jobs, cancels, delays, strict=True)))

    async def one(self, job: Job, cancel: bool, delay_s: float) -> None:
        async with self.gate:
            request, stream = self.frontend.submit(job)
            tokens: list[int] = []
            answer = asyncio.create_task(self.collect(stream, tokens))
            if cancel:
                await asyncio.wait({answer}, timeout=delay_s)
                if not answer.done():
                    answer.cancel()
                    self.frontend.cancel(request)
                    self.num_cancelled += 1
                    assert tokens == oracle(job.tokens, len(tokens), self.model), "a cancelled stream was wrong before"
                    return
            reason = await asyncio.wait_for(answer, 60.0)
            assert reason == Reason.LENGTH
            assert tokens == oracle(job.tokens, job.max_new, self.model)
            self.num_finished += 1

    async def collect(self, stream: Any, tokens: list[int]) -> Reason | None:
        while True:
            chunk = await stream.get()
            assert chunk.error is None, chunk.error
            tokens += chunk.tokens
            if chunk.reason is not None:
                return chunk.reason


def test_two_thousand_requests_on_eight_processes(tmp_path: Path) -> None:
    topology = tmp_path / "cluster.toml"
    topology.write_text(TOPOLOGY)
    journal = tmp_path / "journal"

    async def run(supervisor: Supervisor) -> Load:
        async with connected(supervisor) as frontend:
            load = Load(supervisor, frontend, seed=1)
            await load.run()
            rows = await settled(frontend)
            _, report = await frontend.health()
        assert report["broken_streams"] == 0
        totals = report["totals"]  # a cancel may cross the end of its answer
        assert load.num_finished <= totals["finished"] == NUM_REQUESTS - totals["cancelled"]
        assert sum(row["preempted"] for row in rows) > 0, "decode memory never filled: the test is too easy"
        return load

    with live(topology, model=MODEL, journal=str(journal)) as supervisor:
        load = asyncio.run(run(supervisor))
    assert load.num_cancelled > NUM_REQUESTS * CANCELLED_SHARE / 2
    recordings = read_journals(journal)
    assert len(recordings) == 9
    for recording in recordings:
        outcome = replay(recording)
        assert outcome.difference is None, outcome.difference
        assert outcome.num_events > 100


def test_texts_go_in_and_come_out_and_nothing_is_scored() -> None:
    with live(engine="paced", kv_memory="1MiB", mixed=1) as supervisor, httpx.Client(base_url=supervisor.url) as http:
        chat = {"messages": [{"role": "user", "content": "Tell me a story about a fox."}], "max_tokens": 5}
        assert http.post("/v1/chat/completions", json=chat).json()["usage"]["completion_tokens"] == 5
        for asked in ({"logprobs": 1}, {"logprobs": 0, "echo": True}, {"best_of": 2}):
            got = http.post("/v1/completions", json={"prompt": "The fox", "max_tokens": 2} | asked)
            error = got.json()["error"]
            assert (got.status_code, error["code"]) == (400, "unsupported_parameter")
            assert error["param"] == next(iter(asked))
