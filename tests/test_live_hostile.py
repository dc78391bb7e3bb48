"""Strangers, clients and workers that say what they should not, to the processes of a cluster under load.

Each is hung up on, no process ends, and every answer of everybody else is right.
"""

import asyncio
import contextlib
import random
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
from clusters import answer_of, connected, live, settled

from diptych import journal
from diptych.engine.executor import Sampling
from diptych.engine.paced import oracle
from diptych.policy.messages import Done, Emit, Finish, Publish, Reason
from diptych.policy.retention import Replicate
from diptych.serve.build import cluster_card, facts_of
from diptych.serve.channel import Channel, call
from diptych.serve.frontend import Job
from diptych.serve.supervisor import Supervisor
from diptych.serve.text import prompt_hashes
from diptych.serve.wire import CODEC, Ask, Hello, Ready, Register, Report, Submit, Ticket, pack, pack_ids
from diptych.transfer.seam import NO_PERMIT

TOPOLOGY = """
engine = "paced"
kv_memory = "1MiB"
chunk = 128
[paced]
base_ms = 2.0
vocab = 300
[[worker]]
role = "prefill"
count = 2
[[worker]]
role = "decode"
"""

Words = list[tuple[Any, bytes]]


async def hung_up_on(address: str, key: str, hello: Hello, words: Words, reply: Words | None = None) -> bool:
    """Call, say the words (and `reply` to each Ask); True where the other side hangs up."""
    over = asyncio.Event()

    def met(channel: Channel) -> None:
        channel.lost = lambda why: over.set()
        channel.heard = lambda message, attachment: (
            [channel.say(*word) for word in reply or []] if isinstance(message, Ask) else None
        )

    channel = await call(address, key, hello, met)
    for message, attachment in words:
        channel.say(message, attachment)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(over.wait(), 5)
    channel.close()
    return over.is_set()


async def shout(path: str) -> None:
    """A stranger whose name is no text, and one that says half a frame and leaves."""
    hello = CODEC.encode(Hello("peer", "abcd", 3, bytes(32), bytes(32))).replace(b"abcd", b"\xff\xfe\xff\xff")
    for data in (journal.frame([(hello, b"")]), struct.pack("<I", 4000) + b"\x91" * 99, b"\xff" * 9000):
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(data)
        writer.write_eof()
        with contextlib.suppress(ConnectionError):
            await asyncio.wait_for(reader.read(), 5)
        writer.close()


def submits() -> list[Words]:
    """What an API process can get wrong."""

    def submit(message: Submit, ticket: Ticket) -> Words:
        return [(message, pack(ticket))]

    good, ticket = Submit(1, 2, 4, 0, ()), Ticket(pack_ids([1, 2]), 2, Sampling(), b"")
    return [
        submit(replace(good, num_prompt=3), ticket),
        submit(good, Ticket(pack_ids([1, 2]), 1, Sampling(), b"")),
        submit(good, Ticket(pack_ids([1, 300]), 2, Sampling(), b"")),
        submit(good, Ticket(pack_ids([1, -1]), 2, Sampling(), b"")),
        submit(good, Ticket(pack_ids([1, 2]), 2, Sampling(stop_ids=(300,)), b"")),
        submit(good, Ticket(pack_ids([1, 2]), 2, Sampling(logit_bias=((300, 1.0),)), b"")),
        submit(good, Ticket(pack_ids([1, 2]), 2, Sampling(temperature=float("nan")), b"")),
        submit(good, Ticket(pack_ids([1, 2]), 2, Sampling(), b"x" * 65)),
        submit(replace(good, hashes=(b"x" * 16,)), ticket),
        submit(replace(good, max_new=1 << 40), ticket),
        [(good, b"\x91" * 5000)],
    ]


def test_who_talks_nonsense_is_hung_up_on_and_nobody_else_notices(tmp_path: Path) -> None:
    topology = tmp_path / "cluster.toml"
    topology.write_text(TOPOLOGY)

    async def load(supervisor: Supervisor, frontend: Any, over: asyncio.Event) -> int:
        """Requests, eight at a time, until told to stop; every answer is held to the oracle."""
        rng, card, number = random.Random(4), cluster_card(supervisor.cluster), 0
        while not over.is_set():
            prompts = [[rng.randrange(300) for _ in range(rng.choice((5, 60, 200)))] for _ in range(8)]
            streams = []
            for prompt in prompts:
                root, hashes = prompt_hashes(prompt, card)
                streams.append(frontend.submit(Job(prompt, 30, Sampling(), root=root, hashes=hashes))[1])
            for prompt, stream in zip(prompts, streams, strict=True):
                tokens, _ = await asyncio.wait_for(answer_of(stream), 60)
                assert tokens == oracle(prompt, 30, supervisor.cluster.paced)
                number += 1
        return number

    async def harm(supervisor: Supervisor) -> None:
        cluster, folder, key = supervisor.cluster, supervisor.runtime, supervisor.key
        router = f"unix:{folder}/router.sock"
        for path in Path(folder).glob("*.sock"):
            await shout(str(path))
        for words in submits():
            assert await hung_up_on(router, key, Hello("api", "evil", 0), words), words
        card = Register("evil", 1, 1, "prefill", 10, 16, "unix:/nowhere", b"", facts_of(cluster, cluster.workers[0]))
        assert await hung_up_on(router, key, Hello("worker", "evil", 1), [(replace(card, block_size=0), b"")])
        enter: Words = [(card, b""), (Ready("evil"), b"")]
        others = [(Emit(64 * number, 0, 1), pack_ids([5])) for number in range(1, 3000)]
        for words, reply in (
            (others, []),
            ([(Finish(64 * number, "evil", Reason.LENGTH), b"") for number in range(1, 3000)], []),
            ([(Emit(64, 0, 1), b"")] + others, []),
        ):
            assert await hung_up_on(router, key, Hello("worker", "evil", 1), [*enter, *words], reply)
        async with httpx.AsyncClient() as http:
            nonsense = asyncio.ensure_future(
                hung_up_on(
                    router, key, Hello("worker", "evil", 1), [(card, b"")], [(Report(1 << 40), b""), *_reports()]
                )
            )
            while not nonsense.done():
                await http.get(f"{supervisor.url}/workers")
            assert await nonsense
        for words in peer_words():
            for name in ("p0", "d0"):
                assert await hung_up_on(f"unix:{folder}/{name}.0.sock", key, Hello("peer", "evil", 1), words), words

    async def run(supervisor: Supervisor) -> None:
        async with connected(supervisor) as frontend:
            before = {row["id"]: row["pid"] for row in await frontend.workers()}
            over = asyncio.Event()
            answers = asyncio.ensure_future(load(supervisor, frontend, over))
            await harm(supervisor)
            over.set()
            assert await answers >= 8
            rows = await settled(frontend)
            assert {row["id"]: row["pid"] for row in rows} == before
            assert all(row["incarnation"] == 0 and row["balanced"] for row in rows)

    with live(topology) as supervisor:
        processes = [child.process.pid for child in supervisor.children if child.process]
        asyncio.run(run(supervisor))
        assert [child.process.pid for child in supervisor.children if child.process and not child.process.poll()] == (
            processes
        )


def _reports() -> Words:
    """Answers to an Ask, whatever its number was, that are not what a worker reports."""
    return [(Report(number), b"[") for number in range(1, 20_000)]


def peer_words() -> list[Words]:
    """What no worker can have to say to another."""
    card = Register("evil", 1, 1, "prefill", 10, 16, "unix:/nowhere", b"\x80")
    return [
        [(Done("p1", 64), b"")],
        [(Publish("evil", 64 << 20, (1,), 16, False), b"")],
        [(Publish("evil", 64 << 20, (1 << 31,), 16, False), NO_PERMIT + bytes(8))],
        [(Publish("evil", 64 << 20, (1,), 16, False), bytes(8))],
        [(Publish("evil", 64 << 20, (1,), 16, True), NO_PERMIT + bytes(8) + pack_ids([300]))],
        [(Replicate("evil", 64 << 20, 0, (1, 2), (b"x" * 16,)), NO_PERMIT + bytes(16))],
        [(card, b""), (card, b"")],
        [(Emit(64, 0, 1), b"")],
    ]
