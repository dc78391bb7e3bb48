"""Workers that are stopped, not dead: found by their silence, given up, and no client has to know.

What the router can end (processes of its host) it ends; one of another host ends by itself when it wakes.
"""

import asyncio
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from clusters import answer_of, connected, live, settled

from diptych.engine.executor import Sampling
from diptych.engine.paced import oracle
from diptych.serve.api_process import RouterFrontend
from diptych.serve.build import cluster_card
from diptych.serve.frontend import Job
from diptych.serve.supervisor import Supervisor
from diptych.serve.text import prompt_hashes

TOPOLOGY = """
engine = "paced"
kv_memory = "1MiB"
chunk = 128
lease = 10.0
stuck = 2.0
log_level = "error"
[paced]
base_ms = 4.0
new_token_us = 50
vocab = 300
[[worker]]
role = "prefill"
[[worker]]
role = "decode"
"""


def jobs_of(supervisor: Supervisor, number: int, max_new: int) -> list[Job]:
    rng = random.Random(7)
    jobs = []
    for _ in range(number):
        prompt = [rng.randrange(300) for _ in range(rng.randint(10, 200))]
        root, hashes = prompt_hashes(prompt, cluster_card(supervisor.cluster))
        jobs.append(Job(prompt, max_new, Sampling(), root=root, hashes=hashes))
    return jobs


async def row_of(frontend: RouterFrontend, name: str, state: str = "up", steps: int = 0) -> dict[str, Any]:
    """Wait until a worker is in that state, and has computed so many steps."""
    async with asyncio.timeout(30):
        while True:
            for row in await frontend.workers():
                if row["id"] == name and row["state"] == state and row.get("steps", 0) >= steps:
                    return row
            await asyncio.sleep(0.02)


def test_one_of_another_host_is_given_up_and_ends_when_it_wakes(tmp_path: Path) -> None:
    """It comes over TCP: to the router it might be anywhere, so there is nobody to kill."""
    topology = tmp_path / "cluster.toml"
    topology.write_text(TOPOLOGY)

    async def run(supervisor: Supervisor, far: "subprocess.Popen[bytes]") -> None:
        async with connected(supervisor) as frontend:
            await row_of(frontend, "far")
            jobs = jobs_of(supervisor, 16, 300)
            answers = asyncio.gather(*(answer_of(frontend.submit(job)[1]) for job in jobs))
            await row_of(frontend, "far", steps=50)
            far.send_signal(signal.SIGSTOP)
            for job, (tokens, _) in zip(jobs, await asyncio.wait_for(answers, 60), strict=True):
                assert tokens == oracle(job.tokens, 300, supervisor.cluster.paced)
            rows = await settled(frontend)
            assert {row["id"] for row in rows} == {"p0", "d0"} and all(row["balanced"] for row in rows)
            _, report = await frontend.health()
            assert report["resumed"]["kept"]["requests"] > 0
            assert report["resumed"]["kept"]["prompt_tokens"] == report["broken_streams"] == 0
            far.send_signal(signal.SIGCONT)
            assert await asyncio.to_thread(far.wait, 20) == 1

    with live(topology, listen="127.0.0.1:0") as supervisor:
        assert supervisor.joining is not None
        command = "import sys; from diptych.cli import main; sys.exit(main())"
        words = ["worker", *supervisor.joining.split(), "--role", "decode", "--name", "far"]
        far = subprocess.Popen([sys.executable, "-c", command, *words], stdout=subprocess.DEVNULL)
        try:
            asyncio.run(run(supervisor, far))
        finally:
            far.kill()
            far.wait()


def test_a_cluster_that_is_stopped_altogether_says_so_and_comes_back(tmp_path: Path) -> None:
    topology = tmp_path / "cluster.toml"
    topology.write_text(TOPOLOGY)

    async def run(supervisor: Supervisor) -> None:
        async with connected(supervisor) as frontend:
            (job,) = jobs_of(supervisor, 1, 2000)
            _, stream = frontend.submit(job)
            await row_of(frontend, "d0", steps=10)
            for row in await frontend.workers():
                os.kill(row["pid"], signal.SIGSTOP)
            with pytest.raises(AssertionError, match="no worker is up|was lost"):
                await asyncio.wait_for(answer_of(stream), 20)
            well, report = await frontend.health()
            assert not well and report["paths"] == 0
            async with asyncio.timeout(30):
                while not (await frontend.health())[0]:
                    supervisor._check(restart=True)
                    await asyncio.sleep(0.05)
            (job,) = jobs_of(supervisor, 1, 20)
            tokens, _ = await asyncio.wait_for(answer_of(frontend.submit(job)[1]), 20)
            assert tokens == oracle(job.tokens, 20, supervisor.cluster.paced)

    with live(topology) as supervisor:
        asyncio.run(run(supervisor))
