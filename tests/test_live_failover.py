"""Workers are killed under load: their requests go on elsewhere, from the tokens the client already has.

No stream loses or repeats a token, and where only decode workers die no prompt is computed again.
"""

import asyncio
import os
import random
import signal
from pathlib import Path

from clusters import answer_of, connected, live, settled

from diptych.engine.executor import Sampling
from diptych.engine.paced import oracle
from diptych.journal import read_journals
from diptych.serve.api_process import RouterFrontend
from diptych.serve.build import cluster_card
from diptych.serve.frontend import Job, Stream
from diptych.serve.supervisor import Supervisor
from diptych.serve.text import prompt_hashes
from diptych.sim.replay import replay

TOPOLOGY = """
engine = "paced"
kv_memory = "512KiB"
chunk = 128
lease = 2.0
[paced]
base_ms = 4.0
new_token_us = 50
vocab = 300
[[worker]]
role = "prefill"
count = 2
[[worker]]
role = "decode"
count = 2
"""


def test_streams_survive_the_death_of_their_workers(tmp_path: Path) -> None:
    topology = tmp_path / "cluster.toml"
    topology.write_text(TOPOLOGY)

    async def run(supervisor: Supervisor) -> None:
        rng = random.Random(3)
        card = cluster_card(supervisor.cluster)
        async with connected(supervisor) as frontend:
            jobs = []
            for _ in range(60):
                prompt = [rng.randrange(300) for _ in range(rng.randint(10, 400))]
                root, hashes = prompt_hashes(prompt, card)
                jobs.append(Job(prompt, 100, Sampling(), root=root, hashes=hashes))
            streams = [frontend.submit(job)[1] for job in jobs]
            answers = asyncio.gather(*(answer_of(stream) for stream in streams))
            for name in ("d0", "p1", "d1"):
                await asyncio.sleep(0.4)
                (row,) = [row for row in await frontend.workers() if row["id"] == name]
                os.kill(row["pid"], signal.SIGKILL)
                await back(supervisor, frontend, name)
            for job, (tokens, _) in zip(jobs, await asyncio.wait_for(answers, 60), strict=True):
                assert tokens == oracle(job.tokens, 100, supervisor.cluster.paced)
            rows = await settled(frontend)
            assert {row["id"]: row["incarnation"] for row in rows} == {"p0": 0, "p1": 1, "d0": 1, "d1": 1}
            _, report = await frontend.health()
            assert report["broken_streams"] == 0 and report["totals"]["finished"] == len(jobs)

    journal = tmp_path / "journal"
    with live(topology, journal=str(journal)) as supervisor:
        asyncio.run(run(supervisor))
    recordings = read_journals(journal)
    assert len(recordings) == 8  # the router, four workers, and a second incarnation of three
    for recording in recordings:
        outcome = replay(recording)
        assert outcome.difference is None, outcome.difference


def test_a_decode_workers_death_costs_no_prompt(tmp_path: Path) -> None:
    topology = tmp_path / "cluster.toml"
    topology.write_text(TOPOLOGY.replace("512KiB", "8MiB"))

    async def run(supervisor: Supervisor) -> None:
        rng = random.Random(5)
        card = cluster_card(supervisor.cluster)
        async with connected(supervisor) as frontend:
            jobs = []
            for _ in range(24):
                prompt = [rng.randrange(300) for _ in range(rng.randint(100, 400))]
                root, hashes = prompt_hashes(prompt, card)
                jobs.append(Job(prompt, 400, Sampling(), root=root, hashes=hashes))
            streams = [frontend.submit(job)[1] for job in jobs]
            answers = asyncio.gather(*(answer_of(stream) for stream in streams))
            while sum(row["kept"] for row in await frontend.workers()) < len(jobs):
                await asyncio.sleep(0.01)  # until every answer is being written
            (row,) = [row for row in await frontend.workers() if row["id"] == "d0"]
            os.kill(row["pid"], signal.SIGKILL)
            await back(supervisor, frontend, "d0")
            for job, (tokens, _) in zip(jobs, await asyncio.wait_for(answers, 60), strict=True):
                assert tokens == oracle(job.tokens, 400, supervisor.cluster.paced)
            resumed = [row["resumed"] for row in await settled(frontend) if row["role"] == "prefill"]
            num_resumed = sum(each["requests"] for each in resumed)
            assert num_resumed >= 8 and sum(each["prompt_tokens"] for each in resumed) == 0
            assert sum(each["written_tokens"] for each in resumed) <= 2 * card.block_size * num_resumed
            await check_records(frontend, num_resumed)

    with live(topology) as supervisor:
        asyncio.run(run(supervisor))


def test_with_the_only_decode_worker_dead_the_keeper_goes_on_by_itself(tmp_path: Path) -> None:
    """And takes new requests, until another one is there; nothing of a prompt is computed again."""
    topology = tmp_path / "cluster.toml"
    topology.write_text(TOPOLOGY.replace("count = 2", "count = 1").replace("512KiB", "8MiB"))

    async def run(supervisor: Supervisor) -> None:
        rng, card = random.Random(6), cluster_card(supervisor.cluster)
        async with connected(supervisor) as frontend:

            def ask(num_new: int) -> tuple[Job, Stream]:
                prompt = [rng.randrange(300) for _ in range(rng.randint(100, 300))]
                root, hashes = prompt_hashes(prompt, card)
                job = Job(prompt, num_new, Sampling(), root=root, hashes=hashes)
                return job, frontend.submit(job)[1]

            given = [ask(400) for _ in range(8)]
            answers = asyncio.gather(*(answer_of(stream) for _, stream in given))
            while sum(row["kept"] for row in await frontend.workers()) < len(given):
                await asyncio.sleep(0.01)
            (row,) = [row for row in await frontend.workers() if row["id"] == "d0"]
            os.kill(row["pid"], signal.SIGKILL)
            while (report := (await frontend.health())[1])["paths"]:
                await asyncio.sleep(0.01)
            late, stream = ask(20)
            for job, (tokens, _) in zip(
                [*(job for job, _ in given), late], [*await answers, await answer_of(stream)], strict=True
            ):
                assert tokens == oracle(job.tokens, job.max_new, supervisor.cluster.paced)
            well, report = await frontend.health()
            kept = report["resumed"]["kept"]
            assert well and kept["requests"] == len(given) and kept["prompt_tokens"] == 0
            await back(supervisor, frontend, "d0")
            rows = await settled(frontend)
            assert all(row["balanced"] for row in rows) and (await frontend.health())[1]["paths"] == 1

    with live(topology) as supervisor:
        asyncio.run(run(supervisor))


async def check_records(frontend: RouterFrontend, num_resumed: int) -> None:
    """Each failover is on record, with the gap that its client saw; and the counters know of them, too."""
    records = await frontend.records(limit=256)
    failovers = [failover for record in records for failover in record["failovers"]]
    assert len(failovers) == num_resumed and {failover["reason"] for failover in failovers} == {"worker_lost"}
    for record in records:
        assert record["state"] == "length" and record["output_tokens"] == 400
        resumes = [failover["resume"] for failover in record["failovers"]]
        for waterfall in (record["ttft"], record["handover"], *resumes):
            assert sum(waterfall["parts"].values()) == waterfall["us"] and min(waterfall["parts"].values()) >= 0
        assert all(resume["parts"]["prefill"] > 0 for resume in resumes)
        assert len(record["attempts"]) == 1 + len(resumes)
    _, text = await frontend.metrics()
    assert f'diptych_failovers_total{{reason="worker_lost"}} {num_resumed:.1f}' in text
    assert f"diptych_resume_gap_seconds_count {num_resumed:.1f}" in text


async def back(supervisor: Supervisor, frontend, name: str) -> None:  # type: ignore[no-untyped-def]
    """Let the supervisor notice, and wait until a new incarnation has joined."""
    for _ in range(200):
        supervisor._check(restart=True)
        rows = {row["id"]: row for row in await frontend.workers()}
        if name in rows and rows[name]["state"] == "up" and rows[name]["incarnation"] > 0:
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"{name} did not come back")
