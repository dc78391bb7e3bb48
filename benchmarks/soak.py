"""A long moderate load with everything that clients do wrong, and whether anything grows or is lost meanwhile.

    python benchmarks/soak.py --minutes 60 [--engine paced|torch] [--prefill 1 --decode 1 | --mixed 2] [--out FILE]

Streams that are read to the end, streams whose client leaves (before the first token, or in the middle), stop strings,
several answers at once, sampled ones, shared prefixes, answers without a stream, and requests that are wrong. Every few
seconds it reads the memory, files and threads of every process and the blocks of every worker. At the end it lets
everything drain and says: does memory grow (Theil-Sen slope after a warm-up), do files stay behind, is every block free
or cached and the sum of all states the pool, did anything fail that should not. Exit status 1 where it did. This
process, "client", is shown and not judged: it keeps the samples. Not responsible for speed (`diptych bench`).
"""

import argparse
import asyncio
import http.client
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from diptych.bench import rounds
from diptych.bench.client import Client, Record, completion
from diptych.bench.clusters import model_name, vocab_of, worded
from diptych.bench.processes import Footprint, footprint
from diptych.config import Cluster, load_cluster
from diptych.serve.supervisor import Supervisor

READY_S, DRAIN_S = 120.0, 60.0
MOST_OPEN = 48  # requests under way; what comes beyond waits, so that a stalled machine is not buried
PACED = {"base_ms": 4.0, "new_token_us": 50.0, "context_token_us": 0.1, "kv_bytes_per_token": 64, "vocab": 512}
WARMUP_SHARE, WARMUP_S = 0.25, 300.0  # of the run, at least: pools fill, caches of the allocator settle
JUDGED_S = 300.0  # a slope over less than that is not judged
GROWTH_PER_H = 1 << 20  # bytes: memory that grows more slowly is called flat ...
GROWTH, GROWTH_SHARE = (
    256 << 10,
    0.005,
)  # ... or that grew by less than this in all, or this share: an allocator's noise
MOST_PAIRED = 400  # samples of which slopes between all pairs are taken


# --- what clients do ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Act:
    """One client: what it posts, when it leaves (None: it stays), and whether it should be refused."""

    name: str
    body: bytes
    leaves_after_s: float | None = None
    refused: bool = False


@dataclass(slots=True)
class Crowd:
    """Draws acts. Some prompts share a prefix; tokens are ids below `vocab`."""

    random: Random
    vocab: int
    scored: bool = False  # the engine has log-probabilities
    shared: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.shared = [self._tokens(96) for _ in range(16)]

    def draw(self) -> Act:
        """The next client."""
        kind = self.random.choices(list(ACTS), list(ACTS.values()))[0]
        prompt, num = self._prompt(), self.random.randint(8, 96)
        match kind:
            case "leaves early":
                return Act(kind, completion(prompt, num), self.random.uniform(0.0, 0.01))
            case "leaves midway":
                return Act(kind, completion(prompt, num), self.random.uniform(0.02, 0.4))
            case "stop string":
                stop = [f"w{self.random.randrange(self.vocab)}", "e", "w1"]
                return Act(kind, completion(prompt, num, stop=stop))
            case "several":
                seed = self.random.randrange(1 << 30)
                return Act(kind, completion(prompt, num, n=self.random.randint(2, 4), temperature=0.9, seed=seed))
            case "whole":
                scores = 2 if self.scored else None
                return Act(kind, completion(prompt, num, stream=False, stream_options=None, logprobs=scores))
            case "wrong":
                return Act(kind, self._wrong(prompt), refused=True)
            case _:
                return Act(kind, completion(prompt, num))

    def _wrong(self, prompt: list[int]) -> bytes:
        return self.random.choice(
            [
                b'{"prompt": [1, 2',
                completion([self.vocab + 7], 4),
                completion(prompt, -3),
                completion(prompt, 4, model="nobody"),
                completion(prompt, 4, temperature=-1),
                completion(prompt, 1 << 30),
            ]
        )

    def _prompt(self) -> list[int]:
        own = self._tokens(self.random.choice((24, 60, 200, 400)))
        return own if self.random.random() < 0.6 else self.random.choice(self.shared) + own

    def _tokens(self, num: int) -> list[int]:
        return self.random.choices(range(self.vocab), k=num)


ACTS = {
    "plain": 50, "leaves early": 7, "leaves midway": 15, "stop string": 8, "several": 7, "whole": 7, "wrong": 6,
}  # fmt: skip
"""What clients do, and how often in a hundred."""


@dataclass(slots=True)
class Tally:
    """What came of them. Only counters: this process is watched for growth too."""

    ended: Counter[str] = field(default_factory=Counter)
    unexpected: Counter[str] = field(default_factory=Counter)
    num_tokens: int = 0
    num_open: int = 0

    def note(self, act: Act, record: Record) -> None:
        """One ended."""
        self.num_tokens += len(record.times_s)
        left = act.leaves_after_s is not None and record.error == "unfinished"
        self.ended["left" if left else "refused" if act.refused else "answered"] += 1
        fine = record.error.startswith("4") if act.refused else left or not record.error
        if not fine:
            self.unexpected[f"{act.name}: {record.error or 'was not refused'}"] += 1


async def perform(client: Client, act: Act, tally: Tally) -> None:
    """Be one client."""
    record = Record()
    task = asyncio.create_task(client.send(act.body, record))
    tally.num_open += 1
    try:
        await asyncio.wait({task}, timeout=DRAIN_S if act.leaves_after_s is None else act.leaves_after_s)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    finally:
        tally.num_open -= 1
    if record.error == "unfinished" and act.leaves_after_s is None:
        record.error = f"no end after {DRAIN_S:g} s"
    tally.note(act, record)


async def crowd(client: Client, acts: Crowd, rate: float, until_s: float, tally: Tally) -> None:
    """Clients at random times until a moment of `time.monotonic`; returns when all are gone."""
    gate = asyncio.Semaphore(MOST_OPEN)
    tasks: set[asyncio.Task[None]] = set()

    def gone(task: asyncio.Task[None]) -> None:
        tasks.discard(task)
        gate.release()
        task.result()

    while time.monotonic() < until_s:
        await asyncio.sleep(acts.random.expovariate(rate))
        await gate.acquire()
        task = asyncio.create_task(perform(client, acts.draw(), tally))
        tasks.add(task)
        task.add_done_callback(gone)
    if tasks:
        await asyncio.wait(set(tasks))


# --- what is watched ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sample:
    """Every process and every worker at a moment."""

    at_s: float
    processes: dict[str, Footprint]
    workers: list[dict[str, Any]]


@dataclass(slots=True)
class Soak:
    """A running cluster, watched."""

    port: int
    pids: dict[str, int]
    began_s: float = field(default_factory=time.monotonic)
    samples: list[Sample] = field(default_factory=list)

    def look(self) -> Sample:
        """Take a sample. Also reads /metrics, as a dashboard would."""
        self.get("/metrics")
        workers = msgspec.json.decode(self.get("/workers"))["workers"]
        found = Sample(
            time.monotonic() - self.began_s, {name: footprint(pid) for name, pid in self.pids.items()}, workers
        )
        if len(self.samples) > 1:  # of those between the first and the last only the sizes are kept
            self.samples[-1] = replace(self.samples[-1], workers=[])
        self.samples.append(found)
        return found

    def get(self, path: str) -> bytes:
        """One request on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", path)
            return connection.getresponse().read()
        finally:
            connection.close()

    async def drained(self) -> Sample:
        """A sample once every block is home; the last one taken where that does not happen in time."""
        deadline = time.monotonic() + DRAIN_S
        while True:
            found = await asyncio.to_thread(self.look)
            if all(map(at_home, found.workers)) or time.monotonic() > deadline:
                return found
            self.samples.pop()
            await asyncio.sleep(0.2)


def at_home(row: dict[str, Any]) -> bool:
    """Nothing of any request is left on this worker."""
    blocks = row.get("blocks") or {}
    return bool(blocks) and row["requests"] == 0 and sum(blocks.values()) == blocks["free"] + blocks["cached"]


@contextmanager
def brought_up(cluster: Cluster) -> Iterator[Soak]:
    """The cluster and those who are watched: every process of it, and this one."""
    with worded(cluster) as ready, Supervisor(ready) as supervisor:
        supervisor.wait_ready(READY_S)
        pids = {child.name: child.process.pid for child in supervisor.children if child.process}
        yield Soak(supervisor.port, pids | {"client": os.getpid()})


async def run(soak: Soak, acts: Crowd, rate: float, minutes: float, every_s: float, live: Live) -> tuple[Tally, Sample]:
    """The whole soak; the counters, and the last sample, when all is over."""
    tally, client = Tally(), Client("127.0.0.1", soak.port, exact=False)
    await soak.drained()
    loading = asyncio.create_task(crowd(client, acts, rate, time.monotonic() + 60 * minutes, tally))
    while not loading.done():
        await asyncio.wait({loading}, timeout=every_s)
        await asyncio.to_thread(soak.look)
        live.update(table(soak, tally), refresh=True)
    await loading
    await client.close()
    return tally, await soak.drained()


# --- what it says ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Trend:
    """How a process's memory went after the warm-up, in bytes: slope per hour, last against first fifth, median."""

    per_h: float
    growth: float
    size: float

    @property
    def flat(self) -> bool:
        """It does not grow beyond what is noise."""
        return self.per_h <= GROWTH_PER_H or self.growth <= max(GROWTH, GROWTH_SHARE * self.size)


def trend(times_s: Sequence[float], values: Sequence[float]) -> Trend:
    """By Theil and Sen: the median of the slopes between all pairs, which a few jumps do not move."""
    if len(values) < 5:
        return Trend(0.0, 0.0, 0.0)
    t, v = np.asarray(times_s), np.asarray(values, float)
    fifth, step = max(len(v) // 5, 1), -(-len(v) // MOST_PAIRED)
    growth = float(np.median(v[-fifth:]) - np.median(v[:fifth]))
    some_t, some_v = t[::step], v[::step]
    first, second = np.triu_indices(len(some_t), 1)
    slopes = (some_v[second] - some_v[first]) / np.maximum(some_t[second] - some_t[first], 1e-9)
    return Trend(float(np.median(slopes)) * 3600, growth, float(np.median(v)))


def warm_s(soak: Soak) -> float:
    """When the warm-up ends; a run that is shorter than one is all shown."""
    end_s = soak.samples[-1].at_s
    return max(end_s * WARMUP_SHARE, WARMUP_S) if end_s > WARMUP_S else 0.0


def long_enough(soak: Soak) -> bool:
    """Long enough for its memory to be judged."""
    return soak.samples[-1].at_s >= warm_s(soak) + JUDGED_S and warm_s(soak) > 0


def trends(soak: Soak) -> dict[str, Trend]:
    """Each process's resident memory."""
    begin_s = warm_s(soak)
    measured = [sample for sample in soak.samples if sample.at_s >= begin_s]
    times_s = [sample.at_s for sample in measured]
    return {name: trend(times_s, [s.processes[name].rss_bytes for s in measured]) for name in soak.pids}


def faults(soak: Soak, tally: Tally, last: Sample) -> list[str]:
    """Everything that is not as it should be; empty is good."""
    first = soak.samples[0]
    found = [f"{times} x {what}" for what, times in tally.unexpected.items()]
    for row, before in zip(last.workers, first.workers, strict=True):
        if not at_home(row):
            found.append(f"{row['id']}: blocks did not come home: {row.get('blocks')}, {row.get('requests')} requests")
        if sum((row.get("blocks") or {}).values()) != sum(before["blocks"].values()) or not row.get("balanced"):
            found.append(f"{row['id']}: the states do not add up to the pool")
        if row["pid"] != before["pid"]:
            found.append(f"{row['id']} died and was started again")
    for name in set(soak.pids) - {"client"}:
        was, now = first.processes[name], last.processes[name]
        if now.num_fds > was.num_fds:
            found.append(f"{name}: {now.num_fds - was.num_fds} files stayed open")
    return found


def growing(soak: Soak) -> list[str]:
    """The processes whose memory is not flat; none where the run was too short to say."""
    if not long_enough(soak):
        return []
    judged = {name: found for name, found in trends(soak).items() if name != "client"}
    return [f"{name}: grows {mib(found.per_h)} MiB an hour" for name, found in judged.items() if not found.flat]


def mib(num_bytes: float) -> str:
    """For tables."""
    return f"{num_bytes / (1 << 20):.2f}"


def table(soak: Soak, tally: Tally) -> Group:
    """How it stands."""
    last, slopes = soak.samples[-1], trends(soak)
    memory = Table("process", "RSS MiB", "PSS", "own", "mapped", "files", "threads", "slope MiB/h", "grew MiB")
    for name, held in last.processes.items():
        sizes = (held.rss_bytes, held.pss_bytes, held.anon_bytes, held.shared_bytes)
        drift = (mib(slopes[name].per_h), mib(slopes[name].growth))
        memory.add_row(name, *map(mib, sizes), str(held.num_fds), str(held.num_threads), *drift)
    blocks = Table("worker", "requests", *last.workers[0]["blocks"], "sum")
    for row in last.workers:
        counts = row.get("blocks") or {}
        blocks.add_row(row["id"], str(row.get("requests")), *map(str, counts.values()), str(sum(counts.values())))
    ended = ", ".join(f"{num} {what}" for what, num in tally.ended.items())
    unexpected = f", UNEXPECTED {dict(tally.unexpected)}" if tally.unexpected else ""
    return Group(
        f"{last.at_s / 60:.1f} min: {ended}, {tally.num_open} open, {tally.num_tokens} tokens{unexpected}",
        memory,
        blocks,
    )


def write_chart(path: Path, soak: Soak) -> None:
    """Every process's memory over time, relative to the end of the warm-up."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    minutes = [sample.at_s / 60 for sample in soak.samples]
    for name in soak.pids:
        sizes = [sample.processes[name].rss_bytes / (1 << 20) for sample in soak.samples]
        warm = next(size for size, minute in zip(sizes, minutes, strict=True) if minute >= warm_s(soak) / 60)
        axes.plot(minutes, [size - warm for size in sizes], label=name, lw=1)
    axes.axvline(warm_s(soak) / 60, color="grey", ls=":")
    axes.set(xlabel="minutes", ylabel="RSS, MiB, against the end of the warm-up (dotted)", ylim=(-3, 3))
    axes.grid(alpha=0.3)
    axes.legend(ncols=len(soak.pids), fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> int:
    """Soak, say, keep."""
    arguments = _parse()
    workers = (
        {"mixed": arguments.mixed} if arguments.mixed else {"prefill": arguments.prefill, "decode": arguments.decode}
    )
    own = {"paced": PACED} if arguments.engine == "paced" else {"model": arguments.model}
    cluster = load_cluster(None, {"engine": arguments.engine, "kv_memory": arguments.kv_memory, **workers, **own})
    console = Console(width=max(Console().width, 110))
    with brought_up(cluster) as soak, Live(console=console, auto_refresh=False, transient=True) as live:
        acts = Crowd(Random(arguments.seed), vocab_of(cluster), cluster.engine == "torch")
        tally, last = asyncio.run(run(soak, acts, arguments.rate, arguments.minutes, arguments.every, live))
    about = rounds.environment() | {"model": model_name(cluster), "workers": workers} | _plain(arguments)
    wrong = faults(soak, tally, last) + growing(soak)
    console.print(
        f"{about['engine']} engine, model {about['model']}, {workers}; {arguments.rate:g} requests/s for "
        f"{arguments.minutes:g} min; commit {about['commit']}, {about['when']}",
        highlight=False,
    )
    console.print(table(soak, tally))
    memory = "flat memory on every process" if long_enough(soak) else "too short to judge memory (10 minutes and more)"
    console.print("FAULTS:\n  " + "\n  ".join(wrong) if wrong else f"every block home; {memory}")
    if arguments.out:
        slopes = {name: {"per_h": found.per_h, "growth": found.growth} for name, found in trends(soak).items()}
        kept = {"about": about, "faults": wrong, "ended": tally.ended, "trends": slopes, "samples": soak.samples}
        rounds.write_json(arguments.out, kept)
        write_chart(arguments.out.with_suffix(".png"), soak)
    return 1 if wrong else 0


def _plain(arguments: argparse.Namespace) -> dict[str, Any]:
    return {key: value for key, value in vars(arguments).items() if key not in ("out", "model")}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A long load with cancellations: does anything grow, or get lost?")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--engine", choices=("paced", "torch"), default="paced")
    parser.add_argument("--model", help="torch: a folder, a hub name, or demo (default)")
    parser.add_argument("--prefill", type=int, default=1)
    parser.add_argument("--decode", type=int, default=1)
    parser.add_argument("--mixed", type=int, default=0, help="so many mixed workers instead of pairs")
    parser.add_argument("--kv-memory", default="4MiB", help="of each worker: small, so that it fills in the warm-up")
    parser.add_argument("--rate", type=float, default=8.0, help="clients per second, at random times")
    parser.add_argument("--every", type=float, default=5.0, help="seconds between samples")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON of all samples; a chart beside it, .png")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
