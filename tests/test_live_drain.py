"""Workers of one host drain under load: by hand, by an operator, in a hurry. No stream notices."""

import asyncio
import os
import random
import signal
from pathlib import Path

import pytest
from clusters import answer_of, connected, live, settled

from diptych.engine.executor import Sampling
from diptych.engine.paced import oracle
from diptych.errors import Conflict, NotFound
from diptych.journal import read_journals
from diptych.serve.api_process import RouterFrontend
from diptych.serve.build import cluster_card
from diptych.serve.frontend import Job
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
count = 3
"""


async def leave(supervisor: Supervisor, frontend: RouterFrontend, *names: str) -> None:
    """Wait until these are out of the books and their processes have ended well; they are not started again."""
    children = [child for child in supervisor.children if child.name in names]
    processes = [child.process for child in children if child.process is not None]
    assert len(processes) == len(names)
    async with asyncio.timeout(30):
        while {row["id"] for row in await frontend.workers()} & set(names) or None in [p.poll() for p in processes]:
            await asyncio.sleep(0.02)
    assert [process.returncode for process in processes] == [0] * len(names)
    supervisor._check(restart=True)
    assert all(child.process is None and child.restart_at is None for child in children)


def test_streams_do_not_notice_who_leaves(tmp_path: Path) -> None:
    topology, journal = tmp_path / "cluster.toml", tmp_path / "journal"
    topology.write_text(TOPOLOGY)

    async def run(supervisor: Supervisor) -> None:
        rng = random.Random(3)
        card = cluster_card(supervisor.cluster)
        async with connected(supervisor) as frontend:
            jobs = []
            for _ in range(40):
                prompt = [rng.randrange(300) for _ in range(rng.randint(10, 400))]
                root, hashes = prompt_hashes(prompt, card)
                jobs.append(Job(prompt, 100, Sampling(), root=root, hashes=hashes))
            answers = asyncio.gather(*(answer_of(frontend.submit(job)[1]) for job in jobs))
            await asyncio.sleep(0.3)
            rows = {row["id"]: row for row in await frontend.workers()}
            os.kill(rows["d0"]["pid"], signal.SIGTERM)  # by hand
            async with asyncio.timeout(30):
                while ("d0", "up") in {(row["id"], row["state"]) for row in await frontend.workers()}:
                    await asyncio.sleep(0.02)
            assert (await frontend.drain("p0", None, False))["state"] == "draining"
            hurried = await frontend.drain("d1", 0.05, False)
            assert hurried["timeout_s"] == 0.05
            with pytest.raises(NotFound):
                await frontend.drain("d7", None, False)
            for name in ("d2", "p1"):
                with pytest.raises(Conflict, match="force"):
                    await frontend.drain(name, None, False)
            await leave(supervisor, frontend, "d0", "d1", "p0")
            for job, (tokens, _) in zip(jobs, await asyncio.wait_for(answers, 60), strict=True):
                assert tokens == oracle(job.tokens, 100, supervisor.cluster.paced)
            assert {row["id"] for row in await settled(frontend)} == {"p1", "d2"}
            _, report = await frontend.health()
            assert report["totals"]["finished"] == len(jobs) and report["broken_streams"] == 0
            await frontend.drain("d2", None, True)
            await leave(supervisor, frontend, "d2")
            well, report = await frontend.health()
            assert well and report["paths"] == 0, "p1 alone does both parts"

    with live(topology, journal=str(journal)) as supervisor:
        asyncio.run(run(supervisor))
    for recording in read_journals(journal):
        outcome = replay(recording)
        assert outcome.difference is None, outcome.difference


def test_a_long_prompt_is_progress(tmp_path: Path) -> None:
    """Steps count where no token comes: the chunks of one prompt."""

    async def run(supervisor: Supervisor) -> None:
        async with connected(supervisor) as frontend:
            tokens = [1] * 3000
            _, stream = frontend.submit(Job(tokens, 1, Sampling(), root=b"", hashes=()))
            await asyncio.sleep(1.0)
            _, report = await frontend.health()
            assert report["last_token_s"] > 0.8 > 0.3 > report["last_progress_s"], report
            assert len((await answer_of(stream))[0]) == 1

    slow = {"base_ms": 20.0, "new_token_us": 500.0}
    with live(engine="paced", kv_memory="1MiB", mixed=1, chunk=64, paced=slow) as supervisor:
        asyncio.run(run(supervisor))
