"""What the death of a decode worker costs a stream, and what being ready for it costs all streams.

    python benchmarks/failover.py [--engine paced|torch] [--context 4096] [--rounds 8] [--out FILE] [--markdown]

*Resume gap*: the longest wait between two tokens of a stream whose decode worker is killed in the middle of it. "kept":
nothing else dies, so the prefill worker has prompt and answer still. "re-prefill": the prefill worker that kept them is
killed too, and another one computes everything again, as it would be without retention. In turns, on one cluster of
two prefill and two decode workers.

*Cost of replication*: TPOT of streams on two clusters that differ in `replicate` alone, in turns; and that of the one
without against itself a round later, which is the noise. Not responsible for throughput under load (`diptych bench`).
"""

import argparse
import asyncio
import os
import random
import signal
import statistics
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from diptych.bench import rounds
from diptych.bench.clusters import vocab_of
from diptych.config import load_cluster
from diptych.engine.executor import Sampling
from diptych.serve.api_process import RouterFrontend
from diptych.serve.build import cluster_card
from diptych.serve.frontend import Job
from diptych.serve.process import Orders
from diptych.serve.supervisor import Supervisor
from diptych.serve.text import prompt_hashes

PACED = {"base_ms": 8.0, "new_token_us": 100.0, "context_token_us": 0.04, "kv_bytes_per_token": 512, "vocab": 512}
BEFORE, AFTER = 48, 16  # tokens of a stream before its worker is killed, and after


@contextmanager
def cluster(args: argparse.Namespace, workers: int, replicate: bool = True) -> Iterator[Supervisor]:
    """So many prefill workers and as many decode workers, ready."""
    flags: dict[str, Any] = {
        "port": 0, "prefill": workers, "decode": workers, "engine": args.engine, "model": args.model,
        "kv_memory": args.kv_memory, "chunk": 512, "replicate": replicate, "log_level": "error",
    }  # fmt: skip
    if args.engine == "paced":
        flags["paced"] = PACED
    with Supervisor(load_cluster(None, flags)) as supervisor:
        supervisor.wait_ready()
        yield supervisor


@asynccontextmanager
async def connected(supervisor: Supervisor) -> AsyncIterator[RouterFrontend]:
    """Ask the router itself: token ids in, token ids out."""
    frontend = RouterFrontend()
    await frontend.connect(Orders(supervisor.cluster, supervisor.runtime, supervisor.key, "benchmark"))
    try:
        yield frontend
    finally:
        frontend.close()
        await asyncio.sleep(0.01)


def job(supervisor: Supervisor, rng: random.Random, num_prompt: int, num_new: int) -> Job:
    """A prompt that nobody has seen."""
    vocab = min(vocab_of(supervisor.cluster), 500)
    prompt = [rng.randrange(3, vocab) for _ in range(num_prompt)]
    root, hashes = prompt_hashes(prompt, cluster_card(supervisor.cluster))
    return Job(prompt, num_new, Sampling(), root=root, hashes=hashes)


async def times_of(stream: Any, times: list[float]) -> None:
    """When each token came."""
    while True:
        chunk = await stream.get()
        if chunk.error is not None:
            raise RuntimeError(chunk.error)
        times += [time.monotonic()] * len(chunk.tokens)
        if chunk.reason is not None:
            return


# --- the resume gap ----------------------------------------------------------------------------------------------


async def all_up(supervisor: Supervisor, frontend: RouterFrontend) -> None:
    """Start anew who was killed, and wait until everybody is up and idle."""
    async with asyncio.timeout(120):
        while True:
            supervisor._check(restart=True)
            rows = await frontend.workers()
            up = sum(row["state"] == "up" and row["requests"] == 0 for row in rows)
            if up == len(supervisor.cluster.workers):
                return
            await asyncio.sleep(0.05)


async def gap(supervisor: Supervisor, frontend: RouterFrontend, given: Job, also_keeper: bool) -> tuple[float, float]:
    """One stream whose decode worker dies: its TTFT, and the longest wait from there on."""
    began = time.monotonic()
    times: list[float] = []
    reading = asyncio.ensure_future(times_of(frontend.submit(given)[1], times))
    while len(times) < BEFORE:
        await asyncio.sleep(0.0005)
    rows = await frontend.workers()
    (decode,) = [row for row in rows if row["role"] == "decode" and row["requests"]]
    (keeper,) = [row for row in rows if row["role"] == "prefill" and row["kept"]]
    at = len(times)
    for row in (keeper, decode) if also_keeper else (decode,):
        os.kill(row["pid"], signal.SIGKILL)
    await asyncio.wait_for(reading, 300)
    waits = [after - before for before, after in zip(times[at - 1 :], times[at:], strict=False)]
    return times[0] - began, max(waits)


async def gaps(supervisor: Supervisor, args: argparse.Namespace) -> dict[str, list[float]]:
    """Both ways in turns."""
    rng = random.Random(1)
    found: dict[str, list[float]] = {"kept": [], "re-prefill": [], "ttft": []}
    async with connected(supervisor) as frontend:
        for turn, way in rounds.interleaved(("warm-up", "kept", "re-prefill"), args.rounds):
            if way == "warm-up" and turn:
                continue
            given = job(supervisor, rng, args.context, BEFORE + AFTER + 64)
            ttft_s, gap_s = await gap(supervisor, frontend, given, way == "re-prefill")
            await all_up(supervisor, frontend)
            if way != "warm-up":
                found[way].append(gap_s)
                found["ttft"].append(ttft_s)
    return found


# --- the cost of replication -------------------------------------------------------------------------------------


async def tpot(supervisor: Supervisor, frontend: RouterFrontend, args: argparse.Namespace, rng: random.Random) -> float:
    """Mean seconds per token, after the second one, of some streams at once."""
    jobs = [job(supervisor, rng, 64, args.tokens) for _ in range(args.streams)]
    all_times: list[list[float]] = [[] for _ in jobs]
    streams = [frontend.submit(each)[1] for each in jobs]
    await asyncio.gather(*(times_of(stream, times) for stream, times in zip(streams, all_times, strict=True)))
    return statistics.mean((times[-1] - times[1]) / (len(times) - 2) for times in all_times)


async def tpots(made: dict[str, Supervisor], args: argparse.Namespace) -> dict[str, list[float]]:
    """With and without, in turns; the first of each is a warm-up."""
    rng = random.Random(2)
    found: dict[str, list[float]] = {name: [] for name in made}
    for turn, name in rounds.interleaved(tuple(made), args.rounds + 1):
        async with connected(made[name]) as frontend:
            value = await tpot(made[name], frontend, args, rng)
            if turn:
                found[name].append(value)
    return found


def show(args: argparse.Namespace, resumed: dict[str, list[float]], cost: dict[str, list[float]]) -> None:
    def line(name: str, values: list[float]) -> list[str]:
        spread = rounds.spread([1e3 * value for value in values])
        return [name, spread.show() if spread else "-"]

    def ratio(name: str, mine: list[float], base: list[float]) -> list[str]:
        spread = rounds.ratios(mine, base)
        return [name, spread.show() if spread else "-"]

    without = cost["replicate = false"]
    table = [
        line("resume gap, kept (ms)", resumed["kept"]),
        line("resume gap, re-prefill (ms)", resumed["re-prefill"]),
        ratio("re-prefill / kept", resumed["re-prefill"], resumed["kept"]),
        line("TTFT, nobody dies (ms)", resumed["ttft"]),
        *(line(f"TPOT, {name} (ms)", values) for name, values in cost.items()),
        ratio("with / without replication", cost["replicate = true"], without),
        ratio("without, against itself", without[1:], without[:-1]),
    ]
    title = f"{args.engine}, {args.context} tokens of context, {args.rounds} rounds"
    rounds.print_table(("", "median (least-most)"), table, title, args.markdown)


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("paced", "torch"), default="paced")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--kv-memory", default="256MiB")
    parser.add_argument("--context", type=int, default=4096, help="tokens of the prompts of streams that are resumed")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--streams", type=int, default=8, help="at once, where TPOT is measured")
    parser.add_argument("--tokens", type=int, default=256, help="of each of these")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args()
    with cluster(args, 2) as supervisor:
        resumed = asyncio.run(gaps(supervisor, args))
    with ExitStack() as stack:
        made = {
            f"replicate = {str(replicate).lower()}": stack.enter_context(cluster(args, 1, replicate))
            for replicate in (False, True)
        }
        cost = asyncio.run(tpots(made, args))
    show(args, resumed, cost)
    if args.out is not None:
        given = {key: str(value) for key, value in vars(args).items()}
        rounds.write_json(
            args.out, {"args": given, "environment": rounds.environment(), "gaps_s": resumed, "tpot_s": cost}
        )


if __name__ == "__main__":
    main()
