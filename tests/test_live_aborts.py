"""Both ways of carrying KV in whole processes: idle, a thousand aborts, a reader that is stopped, one that is killed.

What single transports do is in `test_transfer_contract.py` and its neighbours; its docstring has the table.
"""

import asyncio
import os
import random
import signal
import time
from collections.abc import Callable
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
kv_memory = "2MiB"
chunk = 64
lease = {lease}
transport = "{transport}"
[paced]
base_ms = 2.0
new_token_us = 50
vocab = 300
[[worker]]
role = "prefill"
[[worker]]
role = "decode"
"""
TICK = os.sysconf("SC_CLK_TCK")


def run(tmp_path: Path, transport: str, lease: float, story: Callable[[Supervisor, RouterFrontend], Any]) -> None:
    topology = tmp_path / "cluster.toml"
    topology.write_text(TOPOLOGY.format(transport=transport, lease=lease))

    async def main(supervisor: Supervisor) -> None:
        async with connected(supervisor) as frontend:
            await story(supervisor, frontend)

    with live(topology) as supervisor:
        asyncio.run(main(supervisor))


def job(supervisor: Supervisor, rng: random.Random, max_new: int = 40) -> Job:
    card = cluster_card(supervisor.cluster)
    prompt = [rng.randrange(300) for _ in range(rng.randint(1, 300))]
    root, hashes = prompt_hashes(prompt, card)
    return Job(prompt, max_new, Sampling(), root=root, hashes=hashes)


async def row_of(frontend: RouterFrontend, name: str) -> dict[str, Any]:
    (row,) = [row for row in await frontend.workers() if row["id"] == name]
    return row


async def until(frontend: RouterFrontend, name: str, true: Callable[[dict[str, Any]], bool]) -> None:
    """Wait until a worker's row says so."""
    async with asyncio.timeout(20):
        while not true(await row_of(frontend, name)):
            await asyncio.sleep(0.02)


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_a_thousand_aborts_leave_nothing_and_idling_costs_nothing(tmp_path: Path, transport: str) -> None:
    async def abort(frontend: RouterFrontend, supervisor: Supervisor, count: int, seed: int) -> None:
        """So many requests, each given up at a moment of its own, from the queue to the answer."""
        rng, gate = random.Random(seed), asyncio.Semaphore(32)

        async def one() -> None:
            async with gate:
                request, _ = frontend.submit(job(supervisor, rng))
                await asyncio.sleep(rng.random() * rng.choice((0.0, 0.02, 0.2)))
                frontend.cancel(request)

        await asyncio.gather(*(one() for _ in range(count)))
        await settled(frontend)

    async def story(supervisor: Supervisor, frontend: RouterFrontend) -> None:
        await abort(frontend, supervisor, 200, seed=1)
        pids = [row["pid"] for row in await frontend.workers()]
        before = [resident(pid) for pid in pids]
        await abort(frontend, supervisor, 1000, seed=2)
        assert all(resident(pid) - first < 8 << 20 for pid, first in zip(pids, before, strict=True))
        assert all(row["balanced"] for row in await frontend.workers())
        spent, began = [cpu_s(pid) for pid in pids], time.monotonic()
        await asyncio.sleep(2.5)  # nobody asks for anything; CPU time, not wall time, is what is looked at
        passed = time.monotonic() - began
        for pid, first in zip(pids, spent, strict=True):
            assert cpu_s(pid) - first < 0.02 * passed, "an idle worker computes"

    run(tmp_path, transport, 30.0, story)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_a_stopped_reader_costs_a_lease_and_then_computes_what_it_missed(tmp_path: Path, transport: str) -> None:
    async def story(supervisor: Supervisor, frontend: RouterFrontend) -> None:
        rng, pid = random.Random(3), (await row_of(frontend, "d0"))["pid"]
        jobs = [job(supervisor, rng) for _ in range(12)]
        os.kill(pid, signal.SIGSTOP)
        try:
            streams = [frontend.submit(each)[1] for each in jobs]
            await until(frontend, "p0", lambda row: row["blocks"]["offered"] > 0)
            await until(frontend, "p0", lambda row: row["requests"] == 0 and row["blocks"]["offered"] == 0)
        finally:
            os.kill(pid, signal.SIGCONT)
        for each, stream in zip(jobs, streams, strict=True):
            tokens, _ = await asyncio.wait_for(answer_of(stream), 30)
            assert tokens == oracle(each.tokens, each.max_new, supervisor.cluster.paced)
        await settled(frontend)

    run(tmp_path, transport, 1.0, story)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_a_killed_reader_frees_what_it_was_reading_at_once(tmp_path: Path, transport: str) -> None:
    """By the end of its connections: the lease is an hour."""

    async def story(supervisor: Supervisor, frontend: RouterFrontend) -> None:
        rng, pid = random.Random(4), (await row_of(frontend, "d0"))["pid"]
        os.kill(pid, signal.SIGSTOP)
        streams = [frontend.submit(job(supervisor, rng))[1] for _ in range(12)]
        await until(frontend, "p0", lambda row: row["blocks"]["offered"] > 0)
        os.kill(pid, signal.SIGKILL)
        await until(frontend, "p0", lambda row: row["blocks"]["offered"] == 0)
        for stream in streams:  # nobody else is left to answer: it does so itself
            await asyncio.wait_for(answer_of(stream), 20)
        await until(frontend, "p0", lambda row: row["requests"] == 0)
        row = await row_of(frontend, "p0")
        assert row["balanced"] and row["blocks"]["held"] == row["blocks"]["quarantined"] == 0

    run(tmp_path, transport, 3600.0, story)
