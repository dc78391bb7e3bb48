"""A cluster under load whose workers are killed and stopped at random moments, and what that costs its clients.

    python tests/chaos.py                     # the long form: 200 + 100 kills, 20 workers that hang, 20 that pause
    python tests/chaos.py --decode-kills 20 --prefill-kills 10 --stops 2 --pauses 2 --seed 7 --out chaos.json

A paced cluster of real processes answers conversations, and prompts with shared beginnings; a tenth of the clients go.
Every answer is compared with the oracle's. Blows come one by one, most of them alone: after each, the next waits
for a random time and until workers of that kind are up again. At the end every block must be home, and every journal
of every incarnation must replay. Exit status 1 where a law was broken. `test_live_chaos.py` is the short form.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clusters import connected, live, settled

from diptych.engine.executor import Sampling
from diptych.engine.paced import oracle
from diptych.journal import read_journals
from diptych.policy.messages import Reason
from diptych.serve.api_process import RouterFrontend
from diptych.serve.build import cluster_card
from diptych.serve.frontend import Job
from diptych.serve.supervisor import Supervisor
from diptych.serve.text import prompt_hashes
from diptych.sim.replay import replay

TOPOLOGY = """
engine = "paced"
kv_memory = "4MiB"          # 4096 blocks of 16 tokens: what is kept is never evicted
chunk = 128
lease = 15.0                # longer than `stuck`: who waits for one that hangs still has what it offered
stuck = {stuck_s}
[router]
policy = "prefix-aware"
[paced]
base_ms = 8.0
new_token_us = 50
context_token_us = 0.02
vocab = 300
[[worker]]
role = "prefill"
count = {prefill}
[[worker]]
role = "decode"
count = {decode}
"""
GRACE_S = 10.0  # a stream may wait so long beyond `stuck`: to be placed again, behind others, on a machine that is busy
LONG_S = 10.0  # a worker that was up for so long is a victim rather than one that has just come back
MOST_TOKENS = 900  # then a conversation ends
MOST_WRITTEN_BLOCKS = 2  # what a single death may cost of an answer


@dataclass(frozen=True, slots=True)
class Storm:
    """What is to happen. `pauses`: stopped, and woken before anybody may notice. `doubles`: a prefill and a decode
    worker at once."""

    decode_kills: int = 200
    prefill_kills: int = 100
    doubles: int = 10
    stops: int = 20
    pauses: int = 20
    gap_s: float = 1.6  # mean time between blows
    clients: int = 24
    stuck_s: float = 4.0
    seed: int = 1
    prefill: int = 4
    decode: int = 4

    def blows(self, rng: random.Random) -> list[str]:
        """All blows in the order in which they fall."""
        kinds = ["decode"] * self.decode_kills + ["prefill"] * self.prefill_kills + ["both"] * self.doubles
        kinds += ["stop"] * self.stops + ["pause"] * self.pauses
        rng.shuffle(kinds)
        return kinds

    @property
    def deadline_s(self) -> float:
        """No stream waits longer than this for its next token."""
        return self.stuck_s + GRACE_S


@dataclass(slots=True)
class Damage:
    """What it cost."""

    blows: Counter[str] = field(default_factory=Counter)
    finished: int = 0
    cancelled: int = 0
    wrong: list[str] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)  # the longest wait of each stream, the first token's included
    found_s: list[float] = field(default_factory=list)  # from being stopped to being started anew
    resumed: dict[str, dict[str, int]] = field(default_factory=dict)
    totals: dict[str, int] = field(default_factory=dict)
    incarnations: int = 0
    journals: int = 0
    events: int = 0
    seconds: float = 0.0


class Clients:
    """Those who ask: some go on with a conversation, some share the beginning of a prompt, some leave."""

    def __init__(self, supervisor: Supervisor, frontend: RouterFrontend, storm: Storm, damage: Damage):
        self.model = supervisor.cluster.paced
        self.card = cluster_card(supervisor.cluster)
        self.frontend = frontend
        self.rng = random.Random(storm.seed)
        self.damage = damage
        self.shared = [self.tokens(160) for _ in range(8)]
        self.over = False

    def tokens(self, count: int) -> list[int]:
        return [self.rng.randrange(300) for _ in range(count)]

    async def one(self) -> None:
        """A client: one conversation after another, until the storm is over."""
        history: list[int] = []
        while not self.over:
            if not history or len(history) > MOST_TOKENS:
                history = [*(self.rng.choice(self.shared) if self.rng.random() < 0.4 else [])]
            prompt = history + self.tokens(self.rng.randint(20, 300))
            num_new = self.rng.randint(20, 250)
            leaves_s = self.rng.uniform(0.0, 2.0) if self.rng.random() < 0.1 else None
            written = await self.ask(prompt, num_new, leaves_s)
            history = prompt + written if self.rng.random() < 0.6 else []

    async def ask(self, prompt: list[int], num_new: int, leaves_s: float | None) -> list[int]:
        root, hashes = prompt_hashes(prompt, self.card)
        number, stream = self.frontend.submit(Job(prompt, num_new, Sampling(), root=root, hashes=hashes))
        written: list[int] = []
        reading = asyncio.ensure_future(self.read(stream, written))
        await asyncio.wait({reading}, timeout=leaves_s)
        wanted = num_new
        if reading.done():
            if why := reading.result():
                self.damage.wrong.append(why)
            self.damage.finished += 1
        else:
            reading.cancel()
            self.frontend.cancel(number)
            self.damage.cancelled += 1
            wanted = len(written)
        if written != oracle(prompt, wanted, self.model):
            self.damage.wrong.append(f"{len(written)} of {wanted} tokens, or other ones")
        return written

    async def read(self, stream: Any, written: list[int]) -> str:
        """Read to the end; returns what was wrong with it."""
        last, longest = time.monotonic(), 0.0
        while True:
            chunk = await stream.get()
            now = time.monotonic()
            last, longest = now, max(longest, now - last)
            if chunk.error is not None:
                return str(chunk.error)
            written += chunk.tokens
            if chunk.reason is not None:
                self.damage.gaps_s.append(longest)
                return "" if chunk.reason == Reason.LENGTH else str(chunk.reason)


class Weather:
    """Deals the blows."""

    def __init__(self, supervisor: Supervisor, frontend: RouterFrontend, storm: Storm, damage: Damage):
        self.supervisor, self.frontend, self.storm, self.damage = supervisor, frontend, storm, damage
        self.rng = random.Random(storm.seed + 1)
        self.asides: set[asyncio.Task[None]] = set()

    async def rage(self) -> None:
        for kind in self.storm.blows(self.rng):
            await asyncio.sleep(self.rng.expovariate(1 / self.storm.gap_s))
            await self.strike(kind)
            self.damage.blows[kind] += 1
        if self.asides:
            await asyncio.gather(*self.asides)

    async def strike(self, kind: str) -> None:
        roles = ("prefill", "decode") if kind == "both" else (kind,)
        if kind in ("stop", "pause"):
            roles = (self.rng.choice(("prefill", "decode", "decode")),)
        pids = [await self.victim(role) for role in roles]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP if kind in ("stop", "pause") else signal.SIGKILL)
        if kind in ("stop", "pause"):
            task = asyncio.ensure_future(self.wait_stopped(pids[0], kind == "pause"))
            self.asides.add(task)
            task.add_done_callback(self.asides.discard)

    async def victim(self, role: str) -> int:
        """Somebody of that role, where two others can take over; rather one that has been there for long."""
        while True:
            rows = [row for row in await self.frontend.workers() if row["role"] == role and row["state"] == "up"]
            if len(rows) >= min(3, getattr(self.storm, role)):
                break
            await asyncio.sleep(0.05)
        started = {child.name: child.started for child in self.supervisor.children}
        old = [row for row in rows if time.monotonic() - started[row["id"]] > LONG_S]
        return int(self.rng.choice(old or rows)["pid"])

    async def wait_stopped(self, pid: int, pauses: bool) -> None:
        """Wake it before the bound; or wait until somebody has found it."""
        if pauses:
            await asyncio.sleep(self.rng.uniform(0.05, 0.6) * self.storm.stuck_s)
            os.kill(pid, signal.SIGCONT)
            return
        began = time.monotonic()
        async with asyncio.timeout(self.storm.deadline_s):
            while any(child.process is not None and child.process.pid == pid for child in self.supervisor.children):
                await asyncio.sleep(0.02)
        self.damage.found_s.append(time.monotonic() - began)


async def watch(supervisor: Supervisor) -> None:
    """What `Supervisor.watch` does, in turns with us."""
    while True:
        supervisor._check(restart=True)
        given_up = [child.name for child in supervisor.children if child.process is None]
        assert not given_up, given_up
        await asyncio.sleep(0.05)


async def endure(supervisor: Supervisor, storm: Storm) -> Damage:
    """Let the storm pass over a cluster."""
    damage = Damage()
    began = time.monotonic()
    async with connected(supervisor) as frontend:
        clients = Clients(supervisor, frontend, storm, damage)
        watching = asyncio.ensure_future(watch(supervisor))
        asking = [asyncio.ensure_future(clients.one()) for _ in range(storm.clients)]
        raging = asyncio.ensure_future(Weather(supervisor, frontend, storm, damage).rage())
        await asyncio.wait({watching, raging, *asking}, return_when=asyncio.FIRST_COMPLETED)
        if not raging.done():  # somebody else ended: say why
            await next(task for task in (watching, *asking) if task.done())
        await raging
        clients.over = True
        await asyncio.wait_for(asyncio.gather(*asking), 60 + storm.deadline_s)
        await everyone_up(frontend, storm)
        rows = await settled(frontend, 60.0)
        watching.cancel()
        _, report = await frontend.health()
    damage.seconds = time.monotonic() - began
    assert all(row["balanced"] and row["journal_lost"] == 0 for row in rows), rows
    assert report["broken_streams"] == 0
    damage.incarnations = sum(row["incarnation"] + 1 for row in rows)
    damage.resumed, damage.totals = report["resumed"], report["totals"]
    return damage


async def everyone_up(frontend: RouterFrontend, storm: Storm) -> None:
    async with asyncio.timeout(60):
        while sum(row["state"] == "up" for row in await frontend.workers()) < storm.prefill + storm.decode:
            await asyncio.sleep(0.05)


def run(storm: Storm, folder: Path) -> Damage:
    """Start a cluster, let the storm pass, and replay what every incarnation has written down."""
    topology, journal = folder / "cluster.toml", folder / "journal"
    topology.write_text(TOPOLOGY.format(stuck_s=storm.stuck_s, prefill=storm.prefill, decode=storm.decode))
    with live(topology, journal=str(journal), log_level="error") as supervisor:
        damage = asyncio.run(endure(supervisor, storm))
    for recording in read_journals(journal):
        outcome = replay(recording)
        damage.journals += 1
        damage.events += outcome.num_events
        if outcome.difference is not None:
            damage.wrong.append(f"a journal does not replay: {outcome.difference}")
    return damage


def broken_laws(storm: Storm, damage: Damage) -> list[str]:
    """What should not have happened."""
    kept, totals = damage.resumed["kept"], damage.totals
    laws = {
        f"{len(damage.wrong)} answers are wrong: {damage.wrong[:5]}": not damage.wrong,
        f"{kept['prompt_tokens']} tokens of prompts were computed again": kept["prompt_tokens"] == 0,
        f"{kept['most_written']} tokens of an answer were computed again": kept["most_written"]
        <= MOST_WRITTEN_BLOCKS * 16,
        f"a stream waited for {max(damage.gaps_s):.1f} s": max(damage.gaps_s) <= storm.deadline_s,
        f"requests were lost: {totals}": totals["rejected"] == totals["failed"] == 0
        and totals["submitted"] == totals["finished"] + totals["cancelled"],
        f"{damage.journals} journals of {damage.incarnations} workers": damage.journals == damage.incarnations + 1,
        f"{len(damage.found_s)} of {storm.stops} were found": len(damage.found_s) == storm.stops,
    }
    return [broken for broken, holds in laws.items() if not holds]


def rows_of(storm: Storm, damage: Damage) -> list[tuple[str, str]]:
    """What to show."""
    gaps = sorted(damage.gaps_s)
    at = [f"{gaps[int(share * (len(gaps) - 1))]:.2f}" for share in (0.5, 0.99, 1.0)]
    rows = [
        ("blows", ", ".join(f"{count} {kind}" for kind, count in sorted(damage.blows.items()))),
        ("seconds", f"{damage.seconds:.0f}"),
        ("streams finished, each with the oracle's tokens", f"{damage.finished} ({len(damage.wrong)} wrong)"),
        ("streams whose client left", str(damage.cancelled)),
        ("longest wait of a stream: median, p99, worst (s)", f"{', '.join(at)} (deadline {storm.deadline_s:g})"),
        ("hung workers: found and replaced after (s)", ", ".join(f"{each:.1f}" for each in sorted(damage.found_s))),
        ("journals replayed, events", f"{damage.journals}, {damage.events}"),
    ]
    for name, each in damage.resumed.items():
        title = "the keeper was there" if name == "kept" else "the keeper was lost, too"
        again = f"prompt {each['prompt_tokens']}, answer {each['written_tokens']} (most {each['most_written']})"
        rows.append((f"resumed, {title}", f"{each['requests']}; tokens computed again: {again}"))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in Storm.__dataclass_fields__:
        default = getattr(Storm(), name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    parser.add_argument("--out", type=Path)
    flags = vars(parser.parse_args())
    out = flags.pop("out")
    storm = Storm(**flags)
    with tempfile.TemporaryDirectory(prefix="diptych-chaos-") as folder:
        damage = run(storm, Path(folder))
    rows, broken = rows_of(storm, damage), broken_laws(storm, damage)
    for title, value in rows:
        print(f"{title:52} {value}")
    for each in broken:
        print(f"BROKEN: {each}")
    if out is not None:
        gaps = sorted(damage.gaps_s)[-20:]
        out.write_text(
            json.dumps({"storm": flags, "table": dict(rows), "broken": broken, "worst_gaps_s": gaps}, indent=1)
        )
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
