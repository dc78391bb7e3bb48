"""The same answers where KV crosses by TCP: the bundled model and the paced oracle, in every way of asking.

Chunked is one worker, so nothing crosses; shared memory and TCP are two, and the replies are the same three times.
"""

import asyncio
import random
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from clusters import answer_of, connected, live, settled
from reference import Reference
from ways import WAYS, ask, difference

from diptych.config import DEMO
from diptych.engine.executor import Sampling
from diptych.engine.paced import oracle
from diptych.errors import TransferError
from diptych.serve.build import cluster_card, layout_of
from diptych.serve.channel import Channel, call
from diptych.serve.frontend import Job
from diptych.serve.supervisor import Supervisor
from diptych.serve.text import prompt_hashes
from diptych.serve.wire import Hello, Register
from diptych.transfer.pool import Pool
from diptych.transfer.reach import Transports
from diptych.transfer.seam import NO_PERMIT, Plan

MODES: dict[str, dict[str, Any]] = {
    "chunked": {"mixed": 1, "chunk": 32},
    "shm": {"prefill": 1, "decode": 1, "chunk": 32, "transport": "shm"},
    "tcp": {"prefill": 1, "decode": 1, "chunk": 32, "transport": "tcp"},
}


def asked(supervisor: Supervisor) -> dict[str, Any]:
    """What the server answers to each way of asking."""
    with httpx.Client(timeout=60) as http:
        return {way: ask(http, supervisor.url, way) for way in WAYS}


def answers_of(mode: str) -> dict[str, Any]:
    """Start a cluster and ask; the bytes must have crossed, where two workers are at it."""
    with live(**MODES[mode]) as supervisor:
        found = asked(supervisor)
        rows = httpx.get(f"{supervisor.url}/workers").json()["workers"]
        assert (sum(row["kv"]["transfers"] for row in rows) > 0) == (mode != "chunked")
        if mode == "tcp":
            check_against_generate(supervisor)
    return found


@pytest.fixture(scope="module")
def chunked() -> dict[str, Any]:
    return answers_of("chunked")


@pytest.fixture(scope="module", params=["shm", "tcp"])
def apart(request: pytest.FixtureRequest) -> dict[str, Any]:
    return answers_of(request.param)


def check_against_generate(supervisor: Supervisor) -> None:
    """Greedy tokens over TCP are those of transformers."""
    reference, card, rng = Reference(DEMO), cluster_card(supervisor.cluster), random.Random(6)
    prompts = [[rng.randrange(5, card.vocab_size) for _ in range(n)] for n in (1, 17, 130, 400)]

    async def run() -> list[list[int]]:
        async with connected(supervisor) as frontend:
            streams = [frontend.submit(job(prompt, 32, card))[1] for prompt in prompts]
            found = [tokens for tokens, _ in await asyncio.gather(*(answer_of(stream) for stream in streams))]
            await settled(frontend)
            return found

    for prompt, tokens in zip(prompts, asyncio.run(run()), strict=True):
        reference.check(reference.greedy(prompt, 32), tokens, f"over TCP, {len(prompt)} prompt tokens")
    assert reference.num_ties <= 1


def job(prompt: list[int], max_new: int, card: Any) -> Job:
    root, hashes = prompt_hashes(prompt, card)
    return Job(prompt, max_new, Sampling(), root=root, hashes=hashes)


@pytest.mark.parametrize("way", WAYS)
def test_the_way_makes_no_difference(chunked: dict[str, Any], apart: dict[str, Any], way: str) -> None:
    assert difference(apart[way], chunked[way]) == ""


def test_every_page_arrives_whole_over_tcp(tmp_path: Path) -> None:
    """Four workers under load, with pools that fill: the paced model's next token is a hash of all KV."""
    topology = tmp_path / "cluster.toml"
    topology.write_text(
        'engine = "paced"\nkv_memory = "96KiB"\nchunk = 64\ntransport = "tcp"\n[paced]\nbase_ms = 1.0\nvocab = 300\n'
        '[[worker]]\nrole = "prefill"\ncount = 2\n[[worker]]\nrole = "decode"\ncount = 2\n'
    )

    async def run(supervisor: Supervisor) -> None:
        rng, card = random.Random(8), cluster_card(supervisor.cluster)
        async with connected(supervisor) as frontend:
            prompts = [[rng.randrange(300) for _ in range(rng.randint(1, 400))] for _ in range(120)]
            streams = [frontend.submit(job(prompt, 40, card))[1] for prompt in prompts]
            for prompt, stream in zip(prompts, streams, strict=True):
                tokens, _ = await asyncio.wait_for(answer_of(stream), 60)
                assert tokens == oracle(prompt, 40, supervisor.cluster.paced)
            rows = await settled(frontend)
            assert sum(row["kv"]["transfers"] for row in rows) >= 100
            assert sum(row["kv"]["failed"] for row in rows) == 0

    with live(topology) as supervisor:
        asyncio.run(run(supervisor))


async def card_of(supervisor: Supervisor, name: str) -> Register:
    """What a worker says of itself to whoever calls it and knows the key."""
    said: asyncio.Future[Register] = asyncio.get_running_loop().create_future()

    def met(channel: Channel) -> None:
        channel.heard = lambda message, attachment: None if said.done() else said.set_result(message)
        channel.lost = lambda why: None

    address = f"unix:{supervisor.runtime}/{name}.0.sock"
    channel = await call(address, supervisor.key, Hello("peer", "evil", 0), met)
    card = await asyncio.wait_for(said, 10)
    channel.close()
    return card


def test_the_key_alone_opens_no_block(tmp_path: Path) -> None:
    """Whoever has it may connect and ask, while others are answered: for any block, with any permit, it is refused."""
    topology = tmp_path / "cluster.toml"
    topology.write_text(
        'engine = "paced"\nkv_memory = "96KiB"\nchunk = 64\ntransport = "tcp"\n[paced]\nbase_ms = 1.0\nvocab = 300\n'
        '[[worker]]\nrole = "prefill"\n[[worker]]\nrole = "decode"\n'
    )

    async def nose(supervisor: Supervisor, name: str, over: asyncio.Event) -> int:
        card, rng = await card_of(supervisor, name), random.Random(name)
        pool = Pool(layout_of(supervisor.cluster, supervisor.cluster.workers[0]), card.num_blocks)
        evil = Transports("evil", 0, tmp_path, supervisor.key, "127.0.0.1:0", force="tcp")
        evil.register(pool)
        peer = await evil.connect(card.transport)
        refused = 0
        while not over.is_set() or refused < 100:
            ids = np.array([refused % card.num_blocks], np.int32)
            permit = rng.choice((NO_PERMIT, rng.randrange(1, 40).to_bytes(8, "little") + rng.randbytes(16)))
            with pytest.raises(TransferError, match="does not offer these blocks"):
                await peer.read(Plan(ids, ids, codec=rng.choice(("raw", "int8")), permit=permit), 10).done()
            refused += 1
        assert not pool.view.any() and not peer.lost.done()
        await evil.close(0.1)
        pool.close()
        return refused

    async def run(supervisor: Supervisor) -> None:
        rng, card = random.Random(9), cluster_card(supervisor.cluster)
        over = asyncio.Event()
        async with connected(supervisor) as frontend:
            noses = [asyncio.ensure_future(nose(supervisor, name, over)) for name in ("p0", "d0")]
            prompts = [[rng.randrange(300) for _ in range(rng.randint(1, 400))] for _ in range(20)]
            streams = [frontend.submit(job(prompt, 40, card))[1] for prompt in prompts]
            for prompt, stream in zip(prompts, streams, strict=True):
                tokens, _ = await asyncio.wait_for(answer_of(stream), 60)
                assert tokens == oracle(prompt, 40, supervisor.cluster.paced)
            over.set()
            assert min(await asyncio.gather(*noses)) >= 100
            rows = await settled(frontend)
            assert sum(row["kv"]["transfers"] for row in rows) >= 20
            assert sum(row["kv"]["failed"] for row in rows) == 0

    with live(topology) as supervisor:
        asyncio.run(run(supervisor))
