"""The command line: `diptych serve`, `simulate`, `replay`. Short help; every flag is documented in docs/cli.md.

Only reads arguments and prints; the work is in the packages it calls, imported when a command needs them.
"""

import argparse
import logging
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from diptych import __version__
from diptych.errors import DiptychError

if TYPE_CHECKING:
    from diptych.journal import Recording


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        status: int = arguments.command(arguments)
        return status
    except DiptychError as error:
        print(f"diptych: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="diptych", description="Prefill/decode disaggregated inference for large language models."
    )
    parser.add_argument("--version", action="version", version=f"diptych {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_serve(commands)
    _add_simulate(commands)
    _add_replay(commands)
    return parser


def _add_topology(parser: argparse.ArgumentParser) -> None:
    """The flags that say which workers there are: the same in every command."""
    parser.add_argument("cluster", nargs="?", type=Path, metavar="cluster.toml", help="the topology in full")
    parser.add_argument("--prefill", type=int, metavar="N", help="prefill workers (default 1, with --decode 1)")
    parser.add_argument("--decode", type=int, metavar="N", help="decode workers")
    parser.add_argument("--mixed", type=int, metavar="N", help="workers that do both")
    parser.add_argument("--chunk", type=_chunk, metavar="N|off", help="most new tokens in a step (default 512)")
    parser.add_argument("--kv-memory", metavar="SIZE", help="KV memory a worker (default 128MiB, simulated 40GiB)")


def _topology(arguments: argparse.Namespace) -> dict[str, Any]:
    keys = ("prefill", "decode", "mixed", "chunk", "kv_memory")
    return {key: getattr(arguments, key) for key in keys}


def _given(flags: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in flags.items() if value is not None}


def _chunk(text: str) -> int | str:
    if text == "off":
        return text
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError("a number of tokens, or off")
    return int(text)


# --- serve -----------------------------------------------------------------------------------------------------


def _add_serve(commands: Any) -> None:
    parser = commands.add_parser("serve", help="serve a model", description="Serve a model until Ctrl-C.")
    _add_topology(parser)
    parser.add_argument("--model", help="a folder, a hub name, or demo (default), the bundled model")
    parser.add_argument("--engine", choices=("torch", "paced"), help="paced: real processes and KV, pretended compute")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of weights and KV")
    parser.add_argument("--cores", metavar="LIST", help="cores for the workers, like 0,1 or 0-3 (default: all)")
    parser.add_argument("--host", help="address to listen on (default 127.0.0.1)")
    parser.add_argument("--port", type=int, help="port to listen on (default 8000; 0 picks a free one)")
    parser.add_argument("--journal", metavar="FOLDER", help="keep every event and decision there, for replay")
    parser.add_argument("--api-key", metavar="KEY", help="what requests must carry (better: set DIPTYCH_API_KEY)")
    parser.add_argument("--tool-parser", choices=("hermes", "llama3", "none"), help="how the model writes tool calls")
    parser.add_argument("--log-format", choices=("text", "json"), help="of every process's lines (default text)")
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"), help="default info")
    parser.set_defaults(command=_serve)


def _serve(arguments: argparse.Namespace) -> int:
    from diptych.config import load_cluster, parse_cores
    from diptych.serve.logs import set_up
    from diptych.serve.supervisor import Supervisor

    keys = ("model", "engine", "dtype", "host", "port", "journal", "api_key", "tool_parser", "log_format", "log_level")
    flags = _topology(arguments) | {key: getattr(arguments, key) for key in keys}
    flags["cores"] = parse_cores(arguments.cores) if arguments.cores else None
    cluster = load_cluster(arguments.cluster, flags)
    set_up("supervisor", cluster.log_format, cluster.log_level)
    _stop_on_sigterm()
    began = time.monotonic()
    names = ", ".join(f"{worker.name} ({worker.role})" for worker in cluster.workers)
    print(f"starting {names} on {cluster.model} ...", flush=True)
    with Supervisor(cluster, on_event=logging.getLogger("diptych").warning) as supervisor:
        supervisor.wait_ready()
        print(_banner(supervisor.url, time.monotonic() - began), flush=True)
        try:
            supervisor.watch()
        except KeyboardInterrupt:
            print("stopping ...", flush=True)
    return 0


def _stop_on_sigterm() -> None:
    """SIGTERM stops a cluster as Ctrl-C does."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)


def _banner(url: str, seconds: float) -> str:
    return f"""ready after {seconds:.1f} s

  API      {url}/v1
  page     {url}/
  workers  {url}/workers

  curl -N {url}/v1/chat/completions -H 'content-type: application/json' \\
    -d '{{"stream": true, "temperature": 0,
         "messages": [{{"role": "user", "content": "Tell me a story about a fox."}}]}}'

Ctrl-C stops it."""


# --- simulate --------------------------------------------------------------------------------------------------


def _add_simulate(commands: Any) -> None:
    parser = commands.add_parser(
        "simulate",
        help="predict how a cluster serves a load",
        description="Run the server's own router and workers in virtual time at given costs; show what clients see.",
    )
    _add_topology(parser)
    parser.add_argument("--rate", type=float, default=1.0, metavar="R", help="requests per second, Poisson (1)")
    parser.add_argument("--requests", type=int, default=1000, metavar="N", help="how many requests (1000)")
    parser.add_argument("--prompt", type=_lengths, default="512", metavar="LENGTHS", help="512, 64-200 or ~512 (512)")
    parser.add_argument("--output", type=_lengths, default="128", metavar="LENGTHS", help="the same, of answers (128)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="same seed, same run (0)")
    parser.add_argument("--slo", metavar="LIMITS", help="what counts as good, like ttft=0.5,tpot=0.05 (seconds)")
    parser.add_argument(
        "--step-cost", type=_step_cost, default="8e-3,4e-5,4e-8", metavar="A,B,C",
        help="a step takes A + B x new tokens + C x context tokens, seconds (8e-3,4e-5,4e-8)",
    )  # fmt: skip
    parser.add_argument("--link", type=float, default=25.0, metavar="GB/S", help="what KV travels over (25)")
    parser.add_argument("--kv-bytes", type=int, default=131072, metavar="N", help="KV bytes of a token (131072)")
    parser.set_defaults(command=_simulate)


def _simulate(arguments: argparse.Namespace) -> int:
    from diptych.bench.slo import parse_slo
    from diptych.config import load_cluster
    from diptych.sim.costs import Costs, Link
    from diptych.sim.report import render, summarize
    from diptych.sim.run import run_simulation

    cluster = load_cluster(arguments.cluster, {"kv_memory": "40GiB", "engine": "paced"} | _given(_topology(arguments)))
    specs = [
        worker.spec(max(worker.kv_bytes // (worker.block_size * arguments.kv_bytes), 1)) for worker in cluster.workers
    ]
    result = run_simulation(
        specs,
        router=cluster.router,
        costs=Costs(step=arguments.step_cost, kv_bytes_per_token=arguments.kv_bytes),
        link=Link(bytes_per_s=arguments.link * 1e9),
        rate=arguments.rate,
        prompt=arguments.prompt,
        output=arguments.output,
        requests=arguments.requests,
        seed=arguments.seed,
    )
    render(summarize(result, parse_slo(arguments.slo) if arguments.slo else None))
    return 0


def _lengths(text: str) -> Any:
    """Lengths in tokens: 512 (all alike), 64-200 (uniform), ~512 (lognormal with that mean)."""
    from diptych.sim.workload import Lengths

    try:
        if text.startswith("~"):
            return Lengths(float(text[1:]), "lognormal")
        low, _, high = text.partition("-")
        if not high:
            return Lengths(float(low))
        mean = (float(low) + float(high)) / 2
        return Lengths(mean, "uniform", (float(high) - mean) / mean)
    except ValueError:
        raise argparse.ArgumentTypeError("tokens, like 512, 64-200 or ~512") from None


def _step_cost(text: str) -> Any:
    from diptych.sim.costs import StepCost

    try:
        a, b, c = map(float, text.split(","))
        return StepCost(a, b, c)
    except ValueError:
        raise argparse.ArgumentTypeError("three numbers of seconds, like 8e-3,4e-5,4e-8") from None


# --- replay ----------------------------------------------------------------------------------------------------


def _add_replay(commands: Any) -> None:
    parser = commands.add_parser(
        "replay",
        help="re-derive every decision of a journal",
        description="Feed a journal's events to fresh policy objects and compare every order with the recorded one.",
    )
    parser.add_argument("journal", type=Path, metavar="FILE", help="a journal folder, or one file of it")
    parser.add_argument(
        "--closed-loop", action="store_true", help="also live through the run again in the simulator, at measured costs"
    )
    parser.set_defaults(command=_replay)


def _replay(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from diptych.journal import read_journals
    from diptych.sim.replay import replay

    table = Table("object", "incarnation", "events", "orders", "result")
    differences = []
    recordings = read_journals(arguments.journal)
    for recording in recordings:
        outcome = replay(recording)
        header = recording.header
        result = "the same" if outcome.difference is None else "DIFFERS"
        table.add_row(header.object, str(header.incarnation), str(outcome.num_events), str(outcome.num_orders), result)
        if outcome.difference is not None:
            differences.append(f"{header.object}: {outcome.difference}")
    Console().print(table)
    if arguments.closed_loop:
        differences += _closed_loop(recordings)
    for difference in differences:
        print(difference)
    return 1 if differences else 0


def _closed_loop(recordings: "list[Recording]") -> list[str]:
    """Show whether the simulator, given only requests and durations, makes the same decisions; returns differences."""
    from rich.console import Console
    from rich.table import Table

    from diptych.sim.rerun import rerun

    table = Table("object", "decisions", "simulated")
    comparisons = rerun(recordings)
    for made in comparisons:
        table.add_row(made.object, str(made.num_decisions), "the same" if made.difference is None else "DIFFERS")
    Console().print(table)
    return [f"{made.object}: {made.difference}" for made in comparisons if made.difference is not None]
