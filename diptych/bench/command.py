"""`diptych bench URL`: a load on a server that already runs, ours or any that speaks OpenAI's API.

Not responsible for starting servers or for comparing them (`compare.py` does both). Imports what is heavy when it runs:
the command line knows its flags at once.
"""

import argparse
import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.sim.load import Load, add_load_flags, load_of

if TYPE_CHECKING:
    from diptych.bench.client import Record
    from diptych.bench.load import Shot
    from diptych.bench.report import Summary
    from diptych.bench.target import Target
    from diptych.sim.workload import Arrival

SECONDS = 30.0  # how long requests are sent where no flag says
DRAIN_S = 300.0  # how long answers may take after the last request was sent
LATE_S, BUSY = 0.01, 0.7  # a client that sends later than that, or computes more of the time, is told of


def add(commands: Any) -> None:
    """The command and its flags."""
    parser = commands.add_parser(
        "bench", help="send a load to a server and measure it", description="Send a load to a server and measure it."
    )
    parser.add_argument("url", metavar="URL", help="like http://127.0.0.1:8000")
    add_load_flags(parser, rate=4.0, prompt="64-200", output="64-128", seed=1)
    parser.add_argument(
        "--concurrency", type=int, metavar="N", help="closed loop: so many at a time, as fast as they go"
    )
    parser.add_argument("--model", metavar="NAME", help="the model's name (the first one the server lists)")
    parser.add_argument("--api-key", metavar="KEY", help="what requests carry (better: set DIPTYCH_API_KEY)")
    parser.add_argument("--chat", action="store_true", help="ask for chats, with words instead of token ids")
    parser.add_argument("--vocab", type=int, default=256, metavar="N", help="prompts are token ids below this (256)")
    parser.add_argument("--slo", metavar="LIMITS", default="", help="what counts as good, like ttft=0.5,tpot=0.05")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON of the summaries")
    parser.add_argument("--records", type=Path, metavar="FILE", help="JSONL with a line for each request")
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """Send the load and print what came of it; 1 if any request failed."""
    from rich.console import Console

    from diptych.bench.report import by_kind, tables
    from diptych.bench.rounds import check_folders, environment, write_json
    from diptych.bench.slo import parse_slo
    from diptych.bench.target import parse_target
    from diptych.errors import ConfigError
    from diptych.keys import key_of

    slo = parse_slo(arguments.slo)
    for name in ("concurrency", "vocab"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise ConfigError(f"--{name} is at least 1")
    check_folders(arguments.out, arguments.records)
    load = load_of(arguments, seconds=SECONDS)
    key = key_of(arguments.api_key)
    target = parse_target(arguments.url, key=key, chat=arguments.chat, model=arguments.model).asked()
    records, busy = asyncio.run(_send(target, load, arguments))
    found = by_kind(records, slo)
    console = Console()
    pace = f", {arguments.concurrency} at a time whatever the rate" if arguments.concurrency else ""
    console.print(tables(found, f"{arguments.url}, {load}{pace}, seed {load.seed}"), highlight=False)
    for line in _warnings(found["all"], busy):
        console.print(line, markup=False)
    if arguments.out:
        about = environment() | {"url": arguments.url, "model": target.model, "load": str(load), "seed": load.seed}
        write_json(arguments.out, {"about": about, "client_busy": busy, "summaries": found})
    if arguments.records:
        _write_records(arguments.records, records)
    return 1 if found["all"].errors else 0


async def _send(target: "Target", load: Load, arguments: argparse.Namespace) -> "tuple[list[Record], float]":
    """The records, and the share of a core that sending took."""
    from time import perf_counter, process_time

    from diptych.bench.load import closed_loop, open_loop, shots
    from diptych.bench.progress import Watch
    from diptych.errors import ConfigError

    def prepared(arrivals: "Iterator[Arrival]") -> "Iterator[Shot]":
        return shots(arrivals, arguments.vocab, target.fields, target.chat)

    client = target.client()
    records: list[Record] = []
    timed = [] if arguments.concurrency else list(prepared(load.arrivals()))
    if not (timed or arguments.concurrency):
        raise ConfigError("no request would be sent in that time; raise --rate or --seconds")
    begin_s, begin_cpu_s = perf_counter(), process_time()
    try:
        async with Watch(records, len(timed) or load.requests):
            if arguments.concurrency:
                supply = prepared(load.requested())
                await closed_loop(client, supply, arguments.concurrency, load.seconds, DRAIN_S, records)
            else:
                await open_loop(client, timed, DRAIN_S, records)
    except asyncio.CancelledError:  # Ctrl-C: what was measured until then is shown
        print("stopped; what was under way counts as unfinished", file=sys.stderr)
    finally:
        await client.close()
    return records, (process_time() - begin_cpu_s) / (perf_counter() - begin_s)


def _warnings(summary: "Summary", busy: float) -> list[str]:
    """What went wrong, and whether the client is to blame for what it measured."""
    from diptych.bench.report import ms

    lines = [f"{times} x {error}" for error, times in summary.errors.items()]
    if (summary.late_s or 0.0) > LATE_S or busy > BUSY:
        lines.append(
            f"the load generator lagged: it sent up to {ms(summary.late_s)} ms late and was busy {busy:.0%} of the "
            "time; latencies count from when a request should have been sent"
        )
    return lines


def _write_records(path: Path, records: "list[Record]") -> None:
    import msgspec

    from diptych.bench.report import row

    start_s = min((record.due_s for record in records), default=0.0)
    with path.open("wb") as file:
        file.writelines(msgspec.json.encode(row(record, start_s)) + b"\n" for record in records)
