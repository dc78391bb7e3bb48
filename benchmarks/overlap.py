"""How much of a transfer a prompt hides, what running answers notice, and what a conversation need not send again.

    python benchmarks/overlap.py [--ratios 0.5,1,2] [--prompts 12] [--chunks 16] [--out FILE] [--markdown]

A live pair of paced workers with an emulated link, so slow that all of a prompt's KV takes `ratio` times as long as its
prefill. Everything is read from the decode worker's journal: exposed is the time from the final `Publish`, with which
the first token comes, until all is here (`Done`), as a share of the time that the reads took in all. "ideal" is what a
pipeline of the same pieces would expose. Steps of answers that run meanwhile are told apart by whether a read was under
way. Chunks on and off take turns. Not responsible for real networks, or for what copies cost (`transfer.py`).
"""

import argparse
import asyncio
import contextlib
import random
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diptych.bench import rounds
from diptych.config import load_cluster
from diptych.engine.executor import Sampling
from diptych.journal import read_journals
from diptych.policy.messages import Done, Publish, Pull, Read, StepDone
from diptych.serve.api_process import RouterFrontend
from diptych.serve.build import cluster_card
from diptych.serve.frontend import Job
from diptych.serve.process import Orders
from diptych.serve.supervisor import Supervisor
from diptych.serve.text import prompt_hashes

PROMPT, BLOCK, KV_BYTES = 4096, 16, 128
BASE_S, NEW_TOKEN_S = 2e-3, 50e-6
NUM_RUNNING = 4
TOPOLOGY = """
engine = "paced"
kv_memory = "16MiB"
chunk = {chunk}
replicate = false
link = {rate}
[paced]
base_ms = 2.0
new_token_us = 50
context_token_us = 0.0
kv_bytes_per_token = 128
vocab = 300
[[worker]]
role = "prefill"
[[worker]]
role = "decode"
"""


@dataclass(slots=True)
class Watched:
    """What a decode worker's journal says of handovers, and of its steps."""

    exposed_s: list[float] = field(default_factory=list)
    reads_s: list[float] = field(default_factory=list)
    during_s: list[float] = field(default_factory=list)  # between two steps' ends, a read under way at both
    between_s: list[float] = field(default_factory=list)  # the same, none under way

    @property
    def share(self) -> float:
        """Of the time that the reads of a handover took, what came after the first token; the median."""
        return statistics.median(e / r for e, r in zip(self.exposed_s, self.reads_s, strict=True))


def watch(journal: Path) -> Watched:
    """Read the decode worker's journal; handovers of the long prompts only."""
    (recording,) = (each for each in read_journals(journal) if each.header.object == "d0")
    found, final, spent, rids = Watched(), dict[int, float](), dict[int, float](), dict[int, int]()
    large: set[int] = set()
    step_at, quiet = 0.0, True
    for now, event, orders in recording:
        if isinstance(event, Publish):
            if event.final:
                final[event.rid] = now
            if event.num_tokens > PROMPT // 2:
                large.add(event.rid)
        elif isinstance(event, Read):
            rid = rids.pop(event.pull)
            spent[rid] = spent.get(rid, 0.0) + event.elapsed_s
        elif isinstance(event, StepDone):
            if step_at and quiet == (not rids):
                (found.between_s if quiet else found.during_s).append(now - step_at)
            step_at, quiet = now, not rids
        for order in orders:
            if isinstance(order, Pull):
                rids[order.pull] = order.rid
            elif isinstance(order, Done) and order.rid in large:
                found.exposed_s.append(now - final[order.rid])
                found.reads_s.append(spent[order.rid])
    return found


@contextlib.contextmanager
def cluster(folder: Path, chunk: str, rate: float, **flags: Any) -> Iterator[Supervisor]:
    """The pair, up."""
    folder.mkdir(parents=True)
    topology = folder / "cluster.toml"
    topology.write_text(TOPOLOGY.format(chunk=chunk, rate=rate))
    with Supervisor(load_cluster(topology, {"port": 0, "log_level": "error", **flags})) as supervisor:
        supervisor.wait_ready(60.0)
        yield supervisor


@contextlib.asynccontextmanager
async def connected(supervisor: Supervisor) -> AsyncIterator["Asker"]:
    """Token ids in, token ids out."""
    frontend = RouterFrontend()
    await frontend.connect(Orders(supervisor.cluster, supervisor.runtime, supervisor.key, "overlap"))
    try:
        yield Asker(supervisor, frontend)
    finally:
        frontend.close()
        await asyncio.sleep(0.01)


class Asker:
    """A client of one cluster."""

    def __init__(self, supervisor: Supervisor, frontend: RouterFrontend):
        self.card, self.frontend, self.rng = cluster_card(supervisor.cluster), frontend, random.Random(1)

    def text(self, count: int) -> list[int]:
        """Tokens that nobody has seen."""
        return [self.rng.randrange(300) for _ in range(count)]

    async def ask(self, prompt: list[int], max_new: int) -> list[int]:
        """The answer."""
        root, hashes = prompt_hashes(prompt, self.card)
        _, stream = self.frontend.submit(Job(prompt, max_new, Sampling(), 0, root, hashes))
        tokens: list[int] = []
        while True:
            chunk = await stream.get()
            if chunk.error is not None:
                raise RuntimeError(str(chunk.error))
            tokens += chunk.tokens
            if chunk.reason is not None:
                return tokens

    async def kv_bytes(self) -> int:
        """Bytes that decode workers have read so far."""
        return sum(row["kv"]["bytes"] for row in await self.frontend.workers() if row["role"] == "decode")


async def _prompts(supervisor: Supervisor, num_prompts: int) -> None:
    async with connected(supervisor) as asker:
        running = [asyncio.create_task(asker.ask(asker.text(64), 100_000)) for _ in range(NUM_RUNNING)]
        await asyncio.sleep(0.3)
        for _ in range(num_prompts):
            await asker.ask(asker.text(PROMPT), 2)
            await asyncio.sleep(0.2)
        for task in running:
            task.cancel()
        await asyncio.wait(running)


def ideal(num_pieces: int, ratio: float) -> float:
    """The share that a pipeline of equal pieces exposes: each is sent once it is computed and the last one is over."""
    computed = sent = 0.0
    for _ in range(num_pieces):
        computed += 1 / num_pieces
        sent = max(sent, computed) + ratio / num_pieces
    return (sent - computed) / ratio


def measure(folder: Path, ratio: float, num_pieces: int, num_prompts: int) -> Watched:
    """One cluster, some long prompts beside running answers. One piece: chunks are off."""
    prefill_s = num_pieces * BASE_S + PROMPT * NEW_TOKEN_S
    rate = PROMPT * KV_BYTES / (ratio * prefill_s) / 1e9
    chunk = '"off"' if num_pieces == 1 else str(PROMPT // num_pieces)
    with cluster(folder, chunk, rate, journal=str(folder / "journal")) as supervisor:
        asyncio.run(_prompts(supervisor, num_prompts))
    return watch(folder / "journal")


def overlap(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Every ratio, chunks on and off in turns."""
    results = []
    for ratio in (float(text) for text in arguments.ratios.split(",")):
        for pieces in (arguments.chunks, 1):
            found = measure(folder / f"{ratio}-{pieces}", ratio, pieces, arguments.prompts)
            results.append(
                {
                    "ratio": ratio,
                    "pieces": pieces,
                    "exposed": found.share,
                    "ideal": ideal(pieces, ratio),
                    "reads_s": statistics.median(found.reads_s),
                    "itl_during_ms": quantiles(found.during_s),
                    "itl_between_ms": quantiles(found.between_s),
                    "steps": [len(found.during_s), len(found.between_s)],
                }
            )
    return results


def quantiles(values: Sequence[float]) -> tuple[float, float]:
    """p50 and p99 in milliseconds; of too few values for a p99 the p90 (fewer than 1000)."""
    cuts = statistics.quantiles(values, n=100) if len(values) > 1 else [0.0] * 99
    return cuts[49] * 1e3, cuts[98 if len(values) >= 1000 else 89] * 1e3


async def _turns(supervisor: Supervisor, num_turns: int) -> list[tuple[int, int]]:
    """KV bytes of each turn of a conversation, and of a prompt of that length that nobody has seen."""
    found = []
    async with connected(supervisor) as asker:
        said = asker.text(1024)
        for _ in range(num_turns):
            sizes = []
            for prompt in (said, asker.text(len(said))):
                before = await asker.kv_bytes()
                answer = await asker.ask(prompt, 64)
                await asyncio.sleep(0.1)
                sizes.append(await asker.kv_bytes() - before)
                said = prompt + answer + asker.text(32) if prompt is said else said
            found.append((sizes[0], sizes[1]))
    return found


def conversation(folder: Path, num_turns: int = 5) -> list[tuple[int, int]]:
    """A conversation of several turns, each of whose prompts has all of the ones before in it."""
    with cluster(folder, "256", 1.0) as supervisor:
        return asyncio.run(_turns(supervisor, num_turns))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description="What a prompt hides of its transfer.")
    parser.add_argument("--ratios", default="0.5,1,2", help="time of all transfers / time of the prefill")
    parser.add_argument("--prompts", type=int, default=12, help="long prompts for each")
    parser.add_argument("--chunks", type=int, default=16, help="pieces of a prompt")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--markdown", action="store_true")
    arguments = parser.parse_args(argv)
    about = rounds.environment()
    print(f"commit {about['commit']}, {about['when']}, {about['cpu']}, load {about['load_average']}")
    with tempfile.TemporaryDirectory(prefix="overlap") as name:
        results = overlap(arguments, Path(name))
        turns = conversation(Path(name) / "turns")
    rows = []
    for found in results:
        steps = [f"{p50:.2f} / {tail:.2f}" for p50, tail in (found["itl_between_ms"], found["itl_during_ms"])]
        slower = found["itl_during_ms"][0] / max(found["itl_between_ms"][0], 1e-9) - 1
        tail = found["itl_during_ms"][1] / max(found["itl_between_ms"][1], 1e-9) - 1
        pieces = "off" if found["pieces"] == 1 else str(found["pieces"])
        shares = f"{found['exposed']:.1%}", f"{found['ideal']:.1%}"
        rows.append([f"{found['ratio']:g}", pieces, *shares, *steps, f"{slower:+.1%} / {tail:+.1%}"])
    header = ["transfer / prefill", "chunks", "exposed", "ideal", "ITL p50 / p99, quiet, ms", "while reading", "change"]
    rounds.print_table(header, rows, "Exposed handover, and steps of running answers", arguments.markdown)
    rows = [[str(i), str(warm), str(cold), f"{1 - warm / cold:.1%}"] for i, (warm, cold) in enumerate(turns, 1)]
    rounds.print_table(["turn", "KV bytes", "cold", "less"], rows, "A conversation", arguments.markdown)
    later = [sum(sizes) for sizes in zip(*turns[1:], strict=True)]
    print(f"turns 2 to {len(turns)}: {1 - later[0] / later[1]:.1%} fewer bytes of KV than cold")
    if arguments.out:
        said = {"about": about, "arguments": vars(arguments) | {"out": None}, "overlap": results, "turns": turns}
        rounds.write_json(arguments.out, said)
    return 0


if __name__ == "__main__":
    sys.exit(main())
