"""Placement by measured links, live: one prefill worker, a near decode worker and one at the end of a slow link."""

import asyncio
import random
from collections import Counter
from pathlib import Path

from clusters import answer_of, connected, live, settled

from diptych.engine.executor import Sampling
from diptych.engine.paced import oracle
from diptych.journal import Recording, read_journals
from diptych.policy.messages import Place, Reason, Role, Submitted, request_of
from diptych.policy.router import Router
from diptych.serve.api_process import RouterFrontend
from diptych.serve.build import cluster_card
from diptych.serve.frontend import Job
from diptych.serve.supervisor import Supervisor
from diptych.serve.text import prompt_hashes

TOPOLOGY = """
engine = "paced"
kv_memory = "64MiB"
chunk = 512
replicate = false
[paced]
base_ms = 1.0
new_token_us = 50           # 20,000 tokens per second
kv_bytes_per_token = 512
vocab = 300
[[worker]]
role = "prefill"
[[worker]]
role = "decode"
count = 2
[[link]]                    # d1 is far away: a prompt of 512 tokens travels for 35 ms, in which 700 are computed
to = "d1"
rate = 0.0075
"""
PROMPT, WARM_UP, CALM, BURST = 512, 4, 8, 24


class Load:
    """Prompts that have nothing in common."""

    def __init__(self, supervisor: Supervisor, frontend: RouterFrontend):
        self.card, self.model = cluster_card(supervisor.cluster), supervisor.cluster.paced
        self.frontend, self.rng = frontend, random.Random(5)

    async def ask(self, max_new: int) -> None:
        prompt = [self.rng.randrange(300) for _ in range(PROMPT)]
        root, hashes = prompt_hashes(prompt, self.card)
        _, stream = self.frontend.submit(Job(prompt, max_new, Sampling(), 0, root, hashes))
        assert await answer_of(stream) == (oracle(prompt, max_new, self.model), Reason.LENGTH)


def chosen(recording: Recording) -> list[tuple[str, str]]:
    """For each request the decode worker it was placed on, and why: what the router's own events led to."""
    router = Router(recording.header.router)
    made: dict[int, tuple[str, str]] = {}
    for now, event, orders in recording:
        assert router.on(now, event) == orders
        if isinstance(event, Submitted):
            for order in orders:
                if isinstance(order, Place) and order.part == Role.DECODE:
                    number = request_of(order.rid)
                    made[number] = order.worker, router.requests[number].why
    return [made[number] for number in sorted(made)]


def test_near_is_preferred_and_far_takes_the_overflow(tmp_path: Path) -> None:
    topology, journal = tmp_path / "cluster.toml", tmp_path / "journal"
    topology.write_text(TOPOLOGY)

    async def run(supervisor: Supervisor) -> dict[str, int]:
        async with connected(supervisor) as frontend:
            load = Load(supervisor, frontend)
            for _ in range(WARM_UP + CALM):
                await load.ask(2)
            await asyncio.gather(*(load.ask(40) for _ in range(BURST)))
            rows = await settled(frontend)
        return {row["id"]: row["kv"]["bytes"] for row in rows}

    with live(topology, journal=str(journal)) as supervisor:
        read = asyncio.run(run(supervisor))
    (recording,) = (each for each in read_journals(journal) if each.header.object == "router")
    picks = chosen(recording)
    assert {worker for worker, _ in picks[:WARM_UP]} == {"d0", "d1"}, "both are tried before they are known"
    assert {worker for worker, _ in picks[WARM_UP : WARM_UP + CALM]} == {"d0"}
    assert all("before d1" in why and why.startswith("d0 (load") for _, why in picks[WARM_UP : WARM_UP + CALM])
    burst = picks[WARM_UP + CALM :]
    counts = Counter(worker for worker, _ in burst)
    assert counts["d0"] > counts["d1"] > 0
    assert [worker for worker, _ in burst[:5]] == ["d0"] * 5, "the near one first"
    spilled = next(why for worker, why in burst if worker == "d1")
    assert spilled.startswith("d1 (load") and "before d0" in spilled
    assert read["d0"] > read["d1"] > 0
