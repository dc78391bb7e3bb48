"""The command line: `diptych serve`, `simulate`, `replay`, `bench`, `compare`. Short help; docs/cli.md has every flag.

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
from diptych.bench import command as bench
from diptych.bench import compare
from diptych.errors import ConfigError, DiptychError, ProtocolError
from diptych.sim.load import add_load_flags, load_of

if TYPE_CHECKING:
    from diptych.config import Cluster
    from diptych.journal import Recording


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        status: int = arguments.command(arguments)
        return status
    except DiptychError as error:
        print(f"diptych: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError | ProtocolError) else 1  # what is wrong stays so, or what happened
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="diptych", description="Prefill/decode disaggregated inference for large language models."
    )
    parser.add_argument("--version", action="version", version=f"diptych {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_serve(commands)
    _add_worker(commands)
    _add_simulate(commands)
    _add_replay(commands)
    bench.add(commands)
    compare.add(commands)
    for each in commands.choices.values():
        each.allow_abbrev = False  # what a flag's beginning means would change with every flag that is added
    return parser


def _add_topology(parser: argparse.ArgumentParser) -> None:
    """The flags that say which workers there are: the same in every command."""
    parser.add_argument("cluster", nargs="?", type=Path, metavar="cluster.toml", help="the topology in full")
    parser.add_argument("--prefill", type=int, metavar="N", help="prefill workers (default 1, with --decode 1)")
    parser.add_argument("--decode", type=int, metavar="N", help="decode workers")
    parser.add_argument("--mixed", type=int, metavar="N", help="workers that do both")
    parser.add_argument("--chunk", type=_chunk, metavar="N|off", help="most new tokens in a step (default 512)")
    parser.add_argument("--kv-memory", metavar="SIZE", help="KV memory a worker (default 128MiB, simulated 40GiB)")
    parser.add_argument("--max-batch", type=int, metavar="N", help="most sequences that run at once (default 256)")


def _topology(arguments: argparse.Namespace) -> dict[str, Any]:
    keys = ("prefill", "decode", "mixed", "chunk", "kv_memory", "max_batch")
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
    parser.add_argument("--served-model-name", metavar="NAME", help="what clients call it (default: its folder's name)")
    parser.add_argument("--engine", choices=("torch", "paced"), help="paced: real processes and KV, pretended compute")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of weights and KV")
    parser.add_argument("--cores", metavar="LIST", help="cores for the workers, like 0,1 or 0-3 (default: all)")
    parser.add_argument("--host", help="address to listen on (default 127.0.0.1)")
    parser.add_argument("--port", type=int, help="port to listen on (default 8000; 0 picks a free one)")
    parser.add_argument("--journal", metavar="FOLDER", help="keep every event and decision there, for replay")
    parser.add_argument("--api-key", metavar="KEY", help="what requests must carry (better: set DIPTYCH_API_KEY)")
    parser.add_argument(
        "--cors-origin",
        dest="cors_origins",
        action="append",
        metavar="ORIGIN",
        help="web pages that may ask; repeatable",
    )
    parser.add_argument("--listen", metavar="HOST:PORT", help="also take workers of other hosts that join here")
    _add_others(parser)
    parser.add_argument("--tool-parser", choices=("hermes", "llama3", "none"), help="how the model writes tool calls")
    parser.add_argument("--log-format", choices=("text", "json"), help="of every process's lines (default text)")
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"), help="default info")
    parser.set_defaults(command=_serve)


def _add_others(parser: argparse.ArgumentParser) -> None:
    """The flags of a cluster of several hosts: the same for those that wait and those that join."""
    parser.add_argument("--address", metavar="HOST", help="by which other hosts reach this one")
    parser.add_argument("--cluster-key", metavar="KEY", help="what workers must know (better: DIPTYCH_CLUSTER_KEY)")
    parser.add_argument("--key-file", metavar="FILE", help="a file that holds the cluster's key")
    parser.add_argument("--transport", choices=("auto", "shm", "tcp"), help="what KV travels over (default: auto)")
    parser.add_argument("--drain-timeout", type=float, metavar="S", help="seconds a worker may drain (default 300)")


def _serve(arguments: argparse.Namespace) -> int:
    from diptych.config import load_cluster
    from diptych.serve.logs import set_up
    from diptych.serve.supervisor import Supervisor
    from diptych.units import parse_cores

    keys = (
        "model", "engine", "dtype", "host", "port", "journal", "api_key", "tool_parser", "log_format", "log_level",
        "listen", "address", "cluster_key", "key_file", "transport", "drain_timeout",
        "served_model_name", "cors_origins",
    )  # fmt: skip
    flags = _topology(arguments) | {key: getattr(arguments, key) for key in keys}
    flags["cores"] = parse_cores(arguments.cores) if arguments.cores else None
    cluster = load_cluster(arguments.cluster, flags)
    set_up("supervisor", cluster.log_format, cluster.log_level)
    _warn_of_leases(cluster)
    _stop_on_signals()
    began = time.monotonic()
    names = ", ".join(f"{worker.name} ({worker.role})" for worker in cluster.workers) or "a router without workers"
    print(f"starting {names} on {cluster.model} ...", flush=True)
    with Supervisor(cluster, on_event=logging.getLogger("diptych").warning) as supervisor:
        supervisor.wait_ready()
        print(_banner(supervisor.url, time.monotonic() - began, supervisor.joining), flush=True)
        try:
            supervisor.watch()
        except KeyboardInterrupt:
            print("stopping ...", flush=True)
    return 0


def _warn_of_leases(cluster: "Cluster") -> None:
    shortest = min((worker.lease_s for worker in cluster.workers), default=cluster.guest.lease_s)
    if cluster.stuck_s >= shortest:
        what = (
            "stuck (%g s) is not below lease (%g s): KV is given up before a worker that hangs is, so that prompts are"
        )
        logging.getLogger("diptych").warning(f"{what} computed again", cluster.stuck_s, shortest)


def _stop_on_signals() -> None:
    """SIGTERM stops a cluster as Ctrl-C does, and SIGINT also where a shell had it ignored (`serve &` in a script)."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, stop)


def _banner(url: str, seconds: float, joining: str | None) -> str:
    others = f"\n  more     diptych worker {joining} --role decode\n" if joining else ""
    return f"""ready after {seconds:.1f} s

  API      {url}/v1
  page     {url}/
  workers  {url}/workers
{others}
  curl -N {url}/v1/chat/completions -H 'content-type: application/json' \\
    -d '{{"stream": true, "temperature": 0,
         "messages": [{{"role": "user", "content": "Tell me a story about a fox."}}]}}'

Ctrl-C stops it."""


# --- worker ----------------------------------------------------------------------------------------------------


def _add_worker(commands: Any) -> None:
    parser = commands.add_parser(
        "worker",
        help="join a cluster of another host",
        description="Be one worker of a cluster that `diptych serve --listen` runs elsewhere, until drained (Ctrl-C).",
    )
    parser.add_argument("--join", required=True, metavar="HOST:PORT", help="where the cluster listens")
    parser.add_argument("--role", required=True, choices=("prefill", "decode", "mixed"), help="what it is to do")
    parser.add_argument("--name", help="its name in the cluster (default: one that nobody else has)")
    parser.add_argument("--model", help="where the model is on this host (default: as there)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of weights and KV (as there)")
    parser.add_argument("--chunk", type=_chunk, metavar="N|off", help="most new tokens in a step (as there)")
    parser.add_argument("--kv-memory", metavar="SIZE", help="its KV memory (as there)")
    parser.add_argument("--cores", metavar="LIST", help="cores for it, like 0,1 or 0-3 (default: not pinned)")
    parser.add_argument("--journal", metavar="FOLDER", help="keep its events and decisions there, for replay")
    _add_others(parser)
    parser.set_defaults(command=_worker)


def _worker(arguments: argparse.Namespace) -> int:
    from diptych.errors import PeerLost
    from diptych.keys import read_key
    from diptych.policy.messages import Role
    from diptych.serve.join import join
    from diptych.units import parse_cores

    keys = ("model", "dtype", "chunk", "kv_memory", "journal", "transport", "drain_timeout")
    flags = {key: getattr(arguments, key) for key in keys}
    flags["cores"] = tuple(parse_cores(arguments.cores)) if arguments.cores else None
    key = read_key(arguments.cluster_key, arguments.key_file)
    role = Role(arguments.role)
    try:
        return join(
            arguments.join, key, role, arguments.name, arguments.address, flags, lambda text: print(text, flush=True)
        )
    except PeerLost as error:
        print(f"diptych: {error}", file=sys.stderr)
        return 1


# --- simulate --------------------------------------------------------------------------------------------------


def _add_simulate(commands: Any) -> None:
    parser = commands.add_parser(
        "simulate",
        help="predict how a cluster serves a load",
        description="Run the server's own router and workers in virtual time at given costs; show what clients see.",
    )
    _add_topology(parser)
    add_load_flags(parser, rate=1.0, prompt="512", output="128", seed=0)
    parser.add_argument("--slo", metavar="LIMITS", help="what counts as good, like ttft=0.5,tpot=0.05 (seconds)")
    parser.add_argument(
        "--step-cost", type=_step_cost, default="8e-3,4e-5,4e-8", metavar="A,B,C",
        help="a step takes A + B x new tokens + C x context tokens, seconds (8e-3,4e-5,4e-8)",
    )  # fmt: skip
    parser.add_argument("--link", default="25", metavar="RATE", help="what KV travels over: GB/s, or like 10gbe (25)")
    parser.add_argument("--kv-bytes", type=_positive, default=131072, metavar="N", help="KV bytes of a token (131072)")
    parser.set_defaults(command=_simulate)


def _simulate(arguments: argparse.Namespace) -> int:
    from diptych.bench.slo import parse_slo
    from diptych.config import load_cluster
    from diptych.linkrates import parse_rate
    from diptych.sim.costs import Costs, Link
    from diptych.sim.report import render, summarize
    from diptych.sim.run import run_simulation

    # No model is looked at, and none is needed.
    flags = {"kv_memory": "40GiB", "engine": "paced", "model": "demo"} | _given(_topology(arguments))
    cluster = load_cluster(arguments.cluster, flags)
    specs = [
        worker.spec(max(worker.kv_bytes // (worker.block_size * arguments.kv_bytes), 1)) for worker in cluster.workers
    ]
    result = run_simulation(
        specs,
        router=cluster.router,
        costs=Costs(step=arguments.step_cost, kv_bytes_per_token=arguments.kv_bytes),
        link=Link(bytes_per_s=parse_rate(arguments.link), rates=cluster.links),
        arrivals=load_of(arguments, requests=1000).arrivals(cluster.workers[0].block_size),
    )
    render(summarize(result, parse_slo(arguments.slo) if arguments.slo else None))
    return 0


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError("a number, at least 1")
    return int(text)


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
