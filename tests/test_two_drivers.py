"""One policy, two drivers: a live run, lived through again by the simulator at the measured costs, decides the same."""

import asyncio
import random
from pathlib import Path

from clusters import connected, live, settled

from diptych.cli import main
from diptych.engine.executor import Sampling
from diptych.journal import read_journals
from diptych.serve.build import cluster_card
from diptych.serve.frontend import Job
from diptych.serve.supervisor import Supervisor
from diptych.serve.text import prompt_hashes
from diptych.sim.rerun import rerun

TOPOLOGY = """
engine = "paced"
kv_memory = "192KiB"
chunk = 128
lease = 600.0               # no timer fires during the test
[paced]
base_ms = 2.0
new_token_us = 20
context_token_us = 0.05
vocab = 300
[[worker]]
role = "prefill"
count = 2
[[worker]]
role = "decode"
count = 2
[[worker]]
role = "mixed"
"""


async def load(supervisor: Supervisor, num_requests: int) -> None:
    """Requests at random times, some behind shared prefixes, some that write nothing, some cancelled."""
    rng = random.Random(11)
    card = cluster_card(supervisor.cluster)
    shared = [rng.randrange(300) for _ in range(300)]
    async with connected(supervisor) as frontend:
        for _ in range(num_requests):
            prompt = shared[: rng.choice((0, 0, 150, 300))] + [rng.randrange(300) for _ in range(rng.randint(1, 400))]
            root, hashes = prompt_hashes(prompt, card)
            silent = rng.random() < 0.2  # an embedding
            how = Sampling(pooling="last" if silent else "")
            request, _ = frontend.submit(Job(prompt, 0 if silent else rng.randint(1, 60), how, 0, root, hashes))
            if rng.random() < 0.1:
                asyncio.get_running_loop().call_later(rng.random() * 0.3, frontend.cancel, request)
            await asyncio.sleep(rng.expovariate(100.0))
        await settled(frontend)


def test_the_simulator_decides_as_the_server_did(tmp_path: Path) -> None:
    topology, journal = tmp_path / "cluster.toml", tmp_path / "journal"
    topology.write_text(TOPOLOGY)
    with live(topology, journal=str(journal)) as supervisor:
        asyncio.run(load(supervisor, 300))
    comparisons = rerun(read_journals(journal))
    assert {comparison.object for comparison in comparisons} == {"router", "p0", "p1", "d0", "d1", "m0"}
    for comparison in comparisons:
        assert comparison.difference is None, f"{comparison.object}: {comparison.difference}"
        assert comparison.num_decisions > 100
    assert main(["replay", str(journal), "--closed-loop"]) == 0
