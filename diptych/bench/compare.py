"""`diptych compare`: the same load on the same cores, served in several ways, in turns.

A mode is a list of roles and a number: unified (whole prompts), chunked, disaggregated, and budgeted (chunks cut by
predicted time). One cluster lives at a time; router, API process and load generator share the workers' cores in every
mode. Traffic goes to 127.0.0.1 only. Not responsible for what the figures say (`comparison.py`). Imports what is heavy
when it runs.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.errors import ConfigError
from diptych.sim.load import Load, add_load_flags, load_of

if TYPE_CHECKING:
    from diptych.bench.comparison import Found
    from diptych.config import Cluster

SECONDS = 15.0  # of load, each round of each mode, where no flag says
WARMUP_S = 3.0
ITL_BUDGET_S = 0.02  # of the budgeted mode
MODES = ("unified", "chunked", "disaggregated", "budgeted")
PACED = {"base_ms": 4.0, "new_token_us": 50.0, "context_token_us": 0.1, "kv_bytes_per_token": 64, "vocab": 512}


def add(commands: Any) -> None:
    """The command and its flags."""
    parser = commands.add_parser(
        "compare",
        help="one load, served unified, chunked and disaggregated",
        description="Serve the same load on the same cores in several modes, in turns; say what each gains and costs.",
    )
    parser.add_argument(
        "--modes", default=",".join(MODES[:3]), metavar="LIST", help=f"of {','.join(MODES)}; first = base"
    )
    parser.add_argument("--engine", choices=("torch", "paced"), default="torch", help="as in serve (torch)")
    parser.add_argument("--model", metavar="MODEL", help="a folder, a hub name, or demo (default)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of weights and KV (float32)")
    parser.add_argument("--kv-memory", metavar="SIZE", help="KV memory of each worker (128MiB)")
    parser.add_argument("--cores", metavar="LIST", help="cores for the workers, like 0,1 or 0-3 (all)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="workers in each mode (2)")
    parser.add_argument("--prefill", type=int, metavar="N", help="how many of them prefill where apart (half)")
    parser.add_argument(
        "--chunk", type=int, default=256, metavar="N", help="tokens in a step of the chunked mode (256)"
    )
    add_load_flags(parser, rate=8.0, prompt="64-200", output="64-128", seed=1, long_every=2.0)
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="how often each mode has its turn (3)")
    parser.add_argument(
        "--slo", default="ttft=0.5,itl=0.05", metavar="LIMITS", help="what counts as good (%(default)s)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON of everything measured")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="a chart, .png or .svg (needs diptych[chart])")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the comparison, print it, keep it; 1 if a request failed."""
    from diptych.bench import chart, rounds
    from diptych.bench.comparison import show, to_json
    from diptych.bench.slo import parse_slo

    modes = _modes(arguments)
    rounds.check_folders(arguments.out, arguments.chart)
    if arguments.chart:
        chart.check(arguments.chart)  # before minutes are spent
    load = load_of(arguments, seconds=SECONDS)
    slo = parse_slo(arguments.slo)
    found: Found = {mode: [] for mode in modes}
    for turn, mode in rounds.interleaved(modes, arguments.rounds):
        found[mode].append(_round(cluster_of(mode, arguments), load, slo))
        print(f"round {turn + 1} {mode}: {found[mode][-1].line}", flush=True)
    about = _about(arguments, load, found)
    show(found, about, arguments.markdown)
    if arguments.out:
        rounds.write_json(arguments.out, to_json(found, about))
    if arguments.chart:
        chart.draw(arguments.chart, found, about)
        print(f"\n{arguments.chart}")
    return 1 if any(each.total.errors for each in sum(found.values(), [])) else 0


def cluster_of(mode: str, arguments: argparse.Namespace) -> "Cluster":
    """The cluster of a mode: so many workers on the same cores."""
    from diptych.config import load_cluster
    from diptych.units import parse_cores

    cores = parse_cores(arguments.cores) if arguments.cores else None
    flags: dict[str, Any] = {"engine": arguments.engine, "cores": cores, "port": 0, "kv_memory": arguments.kv_memory}
    flags["log_level"] = "warning"  # what is printed is the comparison
    prefill = _num_prefill(arguments)
    match mode:
        case "unified":
            flags |= {"mixed": arguments.workers, "chunk": "off"}
        case "chunked":
            flags |= {"mixed": arguments.workers, "chunk": arguments.chunk}
        case "budgeted":
            flags |= {"mixed": arguments.workers, "chunk": 512, "itl_budget": ITL_BUDGET_S}
        case _:
            flags |= {"prefill": prefill, "decode": arguments.workers - prefill, "chunk": 512}
    own = {"paced": PACED} if arguments.engine == "paced" else {"model": arguments.model, "dtype": arguments.dtype}
    return load_cluster(None, flags | own)


def _num_prefill(arguments: argparse.Namespace) -> int:
    found: int = arguments.workers // 2 if arguments.prefill is None else arguments.prefill
    return found


def _modes(arguments: argparse.Namespace) -> list[str]:
    modes: list[str] = arguments.modes.split(",")
    if unknown := set(modes) - set(MODES):
        raise ConfigError(f"unknown modes: {', '.join(sorted(unknown))}; there are {', '.join(MODES)}")
    if len(set(modes)) < len(modes):
        raise ConfigError("each mode has its turn by itself: name it once")
    if "disaggregated" in modes and not 0 < _num_prefill(arguments) < arguments.workers:
        raise ConfigError("a pair needs a prefill and a decode worker: --workers is at least 2, --prefill less than it")
    for name in ("workers", "rounds", "chunk"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"--{name} is at least 1")
    return modes


def _round(cluster: "Cluster", load: Load, slo: Any) -> Any:
    from diptych.bench.clusters import measure, vocab_of, worded
    from diptych.bench.comparison import Round
    from diptych.bench.load import shots

    vocab = vocab_of(cluster)
    with worded(cluster) as ready:
        prepared = list(shots(load.arrivals(), vocab))
        measured = measure(ready, prepared, list(shots(gentle(load).arrivals(), vocab)))
    return Round.of(measured, slo)


def gentle(load: Load) -> Load:
    """The warm-up: every kind of request, a few of each."""
    if load.trace is not None:
        return replace(load, requests=4)
    rate = max(load.rate / 2, 2.0) if load.rate else 0.0
    long_every_s = WARMUP_S / 2 if load.long_every_s else 0.0
    seconds = min(WARMUP_S, load.seconds)
    return replace(load, rate=rate, long_every_s=long_every_s, seconds=seconds, requests=None, seed=load.seed + 1)


def _about(arguments: argparse.Namespace, load: Load, found: "Found") -> dict[str, Any]:
    from diptych.bench import rounds
    from diptych.bench.clusters import model_name
    from diptych.units import parse_cores

    cluster = cluster_of(next(iter(found)), arguments)
    paced = arguments.engine == "paced"
    keys = ("engine", "workers", "prefill", "rounds", "chunk", "slo")
    return rounds.environment(parse_cores(arguments.cores) if arguments.cores else None) | {
        **{key: getattr(arguments, key) for key in keys},
        "model": model_name(cluster),
        "dtype": "-" if paced else cluster.workers[0].dtype,
        "paced": PACED if paced else None,
        "load": str(load),
        "seconds": load.seconds,
        "seed": load.seed,
        "num_requests": next(iter(found.values()))[0].total.num,
    }
