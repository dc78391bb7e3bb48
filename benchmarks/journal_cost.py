"""What keeping a journal costs in CPU: a paced cluster with and without it, and the recording alone.

    python benchmarks/journal_cost.py [--rounds 3] [--seconds 20] [--rate 10] [--out FILE] [--markdown]

Two measures. In turns (A B A B) the same seeded load runs on a disaggregated paced cluster without and with a journal,
and the CPU seconds of router and workers are compared; also per CPU second of the API process and the load generator,
which keep no journal: where a machine's speed changes from round to round, theirs does too. And the events of the last
journal are recorded again by a journal on its own: CPU time per event, encoding and writing thread together, times the
number of events, as a share of the CPU time those processes used (a paced engine computes nothing, so the share is at
its largest) and of a core. Not responsible for disks: bytes go to a temporary folder.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from diptych.bench import rounds
from diptych.bench.clusters import Measured, measure, vocab_of, worded
from diptych.bench.load import shots
from diptych.bench.processes import Usage
from diptych.bench.report import summarize
from diptych.config import load_cluster
from diptych.journal import Journal, Recording, read_journals
from diptych.sim.load import Load
from diptych.sim.workload import parse_lengths

NAMES = ("without", "with")
PACED = {"base_ms": 4.0, "new_token_us": 50.0, "context_token_us": 0.1, "kv_bytes_per_token": 64, "vocab": 512}
PROMPT, OUTPUT = parse_lengths("64-200"), parse_lengths("64-128")
YARDSTICK = ("api", "client")  # they do the same work in every round and keep no journal
MIN_EVENTS = 20_000  # recorded again at least, so that CPU clocks are fine enough


class Alone(msgspec.Struct, frozen=True):
    """One object's journal, recorded again by itself."""

    num_events: int
    num_orders: int
    num_bytes: int
    us_per_event: float


@dataclass(slots=True)
class Found:
    """Everything measured."""

    usages: dict[str, list[Usage]]
    alone: dict[str, Alone]


def main() -> int:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description="The CPU cost of the journal.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--rate", type=float, default=10.0, help="chats per second")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON of everything measured")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    arguments = parser.parse_args()
    about = rounds.environment() | {key: getattr(arguments, key) for key in ("rounds", "seconds", "rate", "seed")}
    found = _measure(arguments)
    print(
        f"paced engine, 1 prefill + 1 decode worker; cores {about['cores']} of {about['cpu']}; commit "
        f"{about['commit']}, {about['when']}; {arguments.rate:g} chats/s and a long prompt every 2 s for "
        f"{arguments.seconds:g} s, seed {arguments.seed}, {arguments.rounds} rounds in turns"
    )
    rounds.print_table(*_compared(found), markdown=arguments.markdown)
    rounds.print_table(*_shares(found), markdown=arguments.markdown)
    if arguments.out:
        kept = {"about": about, "usages": found.usages, "alone": found.alone}
        rounds.write_json(arguments.out, kept)
    return 0


def _measure(arguments: argparse.Namespace) -> Found:
    found = Found({name: [] for name in NAMES}, {})
    for turn, name in rounds.interleaved(NAMES, arguments.rounds):
        with tempfile.TemporaryDirectory(prefix="diptych-journal-") as folder:
            measured = _run(arguments, folder if name == "with" else None)
            found.usages[name].append(measured.usage)
            errors = summarize(measured.records).errors
            note = "" if measured.usage.valid else "  NOT VALID: others were on the cores"
            print(f"round {turn + 1} {name}: {len(measured.records)} requests, errors {errors}{note}", flush=True)
            if name == "with":
                found.alone = {r.header.object: _alone(r) for r in read_journals(Path(folder))}
    return found


def _run(arguments: argparse.Namespace, journal: str | None) -> Measured:
    flags: dict[str, Any] = {"engine": "paced", "prefill": 1, "decode": 1, "paced": PACED, "journal": journal}
    cluster = load_cluster(None, flags)
    vocab = vocab_of(cluster)
    chats = Load(arguments.rate, prompt=PROMPT, output=OUTPUT, long_every_s=2.0, seconds=arguments.seconds)
    load = replace(chats, seed=arguments.seed)
    warmup = replace(chats, rate=4.0, long_every_s=1.0, seconds=2.0, seed=arguments.seed + 1)
    with worded(cluster) as ready:
        return measure(ready, list(shots(load.arrivals(), vocab)), list(shots(warmup.arrivals(), vocab)))


def _alone(recording: Recording) -> Alone:
    """Record the same events again: process CPU time, so the writing thread counts."""
    entries = list(recording)
    repeats = -(-MIN_EVENTS // max(len(entries), 1))
    header = recording.header
    spec = header.router or header.worker
    assert spec is not None
    with tempfile.TemporaryDirectory(prefix="diptych-journal-") as folder:
        begin_s = time.process_time()
        journal = Journal(Path(folder), header.object, 0, spec)
        for _ in range(repeats):
            for now, event, orders in entries:
                journal.record(now, event, orders)
        journal.close()
        spent_s = time.process_time() - begin_s
    num_bytes = sum(segment.stat().st_size for segment in recording.segments)
    num_orders = sum(len(orders) for _, _, orders in entries)
    return Alone(len(entries), num_orders, num_bytes, spent_s / (repeats * max(len(entries), 1)) * 1e6)


# --- tables: (header, rows, title) -----------------------------------------------------------------------------


def _compared(found: Found) -> tuple[list[str], list[list[str]], str]:
    """CPU seconds with and without, and their ratio round by round."""
    names = list(found.alone)
    lines = []
    for label, members in (*((name, [name]) for name in names), ("all of them", names)):
        lines.append([label, *_cells({n: [_cpu_s(u, members) for u in us] for n, us in found.usages.items()})])
    per_yard = {n: [_cpu_s(u, names) / max(_cpu_s(u, YARDSTICK), 1e-9) for u in us] for n, us in found.usages.items()}
    lines.append(["all of them, per CPU second of API process and client", *_cells(per_yard)])
    title = "CPU seconds, median over rounds (least–most); the spread of a column is its noise"
    return ["process", "without journal", "with journal", "with ÷ without"], lines, title


def _cpu_s(usage: Usage, names: Sequence[str]) -> float:
    return sum(usage.processes[name].cpu_s for name in names)


def _cells(values: dict[str, list[float]]) -> list[str]:
    spreads = (rounds.spread(values["without"]), rounds.spread(values["with"]))
    return [cell.show() if cell else "-" for cell in (*spreads, rounds.ratios(values["with"], values["without"]))]


def _shares(found: Found) -> tuple[list[str], list[list[str]], str]:
    """The recording alone, as shares of the last round's CPU and wall time."""
    usage = found.usages["with"][-1]
    lines, total_cost_s, total_cpu_s = [], 0.0, 0.0
    for name, alone in found.alone.items():
        cpu_s = usage.processes[name].cpu_s
        cost_s = alone.us_per_event * alone.num_events / 1e6
        total_cost_s, total_cpu_s = total_cost_s + cost_s, total_cpu_s + cpu_s
        lines.append(
            [
                name,
                str(alone.num_events),
                f"{alone.num_orders / max(alone.num_events, 1):.1f}",
                f"{alone.num_bytes / max(alone.num_events, 1):.0f}",
                f"{alone.us_per_event:.1f}",
                f"{cost_s / cpu_s:.1%}" if cpu_s else "-",
                f"{cost_s / usage.wall_s:.2%}",
            ]
        )
    share = f"{total_cost_s / total_cpu_s:.1%}" if total_cpu_s else "-"
    lines.append(["all of them", "", "", "", "", share, f"{total_cost_s / usage.wall_s:.2%}"])
    header = ["object", "events", "orders/event", "bytes/event", "µs/event", "of the CPU it used", "of one core"]
    return header, lines, "recording alone (warm-up's events included: shares are a little too high)"


if __name__ == "__main__":
    sys.exit(main())
