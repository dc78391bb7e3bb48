"""The same mixed load on a unified, a chunked and a disaggregated cluster of the same cores.

    python benchmarks/modes.py --engine paced|torch [--rounds 3] [--seconds 30] [--out FILE] [--markdown]

Short chats arrive at random, and a long prompt every few seconds. Each mode has two workers (with torch: half of the
cores each); router, API process and load generator share the same cores in every mode. Besides the three there is
"budgeted": chunks cut so that a step with decodes stays inside an inter-token budget. One cluster lives at a time;
rounds are interleaved (A B C A B C), every round sends the same seeded load to a fresh cluster after a warm-up. Traffic
goes to 127.0.0.1 only. Not responsible for saying which mode is best: that depends on the load.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from diptych.bench import rounds
from diptych.bench.clusters import Measured, measure, model_name, vocab_of, worded
from diptych.bench.load import CHAT, LONG, Mix, Shape, Shot, mixed
from diptych.bench.processes import MAX_FOREIGN, Usage
from diptych.bench.report import Summary, by_kind
from diptych.bench.slo import Slo, parse_slo
from diptych.config import Cluster, load_cluster, parse_cores

WARMUP_S = 3.0
ITL_BUDGET_S = 0.02  # of the budgeted mode
MODES = ("unified", "chunked", "disaggregated", "budgeted")


@dataclass(frozen=True, slots=True)
class Defaults:
    """What suits an engine, where no flag says otherwise."""

    rate: float
    long_every_s: float
    chunk: int
    slo: str


DEFAULTS = {
    "paced": Defaults(rate=8.0, long_every_s=2.0, chunk=256, slo="ttft=0.5,itl=0.05"),
    "torch": Defaults(rate=6.0, long_every_s=2.0, chunk=128, slo="ttft=0.5,itl=0.05"),
}
PACED = {"base_ms": 4.0, "new_token_us": 50.0, "context_token_us": 0.1, "kv_bytes_per_token": 64, "vocab": 512}


class Round(msgspec.Struct, frozen=True):
    """One mode under the load once."""

    kinds: dict[str, Summary]
    usage: Usage
    workers: list[dict[str, Any]]


def main() -> int:
    """Run the comparison, print it, keep it."""
    arguments = _parse()
    slo, mix = parse_slo(arguments.slo), _mix(arguments)
    results: dict[str, list[Round]] = {mode: [] for mode in arguments.modes}
    about: dict[str, Any] = {}
    for turn, mode in rounds.interleaved(arguments.modes, arguments.rounds):
        cluster = _cluster(mode, arguments)
        vocab = vocab_of(cluster)
        shots = mixed(mix, arguments.seconds, arguments.seed, vocab)
        about = about or _about(arguments, cluster, mix, shots)
        with worded(cluster) as ready:
            measured = measure(ready, shots, mixed(_gentle(mix), WARMUP_S, arguments.seed + 1, vocab))
        results[mode].append(_round(measured, slo))
        _say(turn, mode, results[mode][-1])
    _show(results, about, arguments.markdown)
    if arguments.out:
        rounds.write_json(arguments.out, {"about": about, "rounds": results})
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="One mixed load, several ways to use the same cores.")
    parser.add_argument("--engine", choices=tuple(DEFAULTS), default="paced")
    parser.add_argument("--model", help="torch: a folder, a hub name, or demo (default)")
    parser.add_argument("--dtype", default="float32", help="torch: of weights and KV")
    parser.add_argument("--modes", default="unified,chunked,disaggregated", help=f"of {','.join(MODES)}; first = base")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=30.0, help="of load, each round of each mode")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rate", type=float, help="chats per second")
    parser.add_argument("--long-every", type=float, help="seconds between long prompts")
    parser.add_argument("--long-prompt", default="2000-4000", help="tokens, from-to")
    parser.add_argument("--chunk", type=int, help="tokens in a step of the chunked mode")
    parser.add_argument("--slo", help="like ttft=0.5,tpot=0.05,itl=0.05")
    parser.add_argument("--cores", type=parse_cores, help="torch: cores for the workers, like 0,1 (default: all)")
    parser.add_argument("--out", type=Path, help="JSON of everything measured")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    arguments = parser.parse_args()
    defaults = DEFAULTS[arguments.engine]
    arguments.rate = defaults.rate if arguments.rate is None else arguments.rate
    arguments.long_every = defaults.long_every_s if arguments.long_every is None else arguments.long_every
    arguments.chunk = arguments.chunk or defaults.chunk
    arguments.slo = arguments.slo or defaults.slo
    arguments.modes = arguments.modes.split(",")
    if unknown := set(arguments.modes) - set(MODES):
        parser.error(f"unknown modes: {', '.join(sorted(unknown))}")
    return arguments


def _mix(arguments: argparse.Namespace) -> Mix:
    low, _, high = arguments.long_prompt.partition("-")
    return Mix(arguments.rate, arguments.long_every, CHAT, Shape("long", (int(low), int(high or low)), LONG.answer))


def _gentle(mix: Mix) -> Mix:
    """The warm-up: every kind of request, a few of each."""
    return Mix(max(mix.rate / 2, 2.0), WARMUP_S / 2, mix.chat, mix.long)


def _cluster(mode: str, arguments: argparse.Namespace) -> Cluster:
    flags: dict[str, Any] = {"engine": arguments.engine, "cores": arguments.cores, "port": 0}
    match mode:
        case "unified":
            flags |= {"mixed": 2, "chunk": "off"}
        case "chunked":
            flags |= {"mixed": 2, "chunk": arguments.chunk}
        case "budgeted":
            flags |= {"mixed": 2, "chunk": 512, "itl_budget": ITL_BUDGET_S}
        case _:
            flags |= {"prefill": 1, "decode": 1, "chunk": 512}
    if arguments.engine == "paced":
        flags["paced"] = PACED
    else:
        flags |= {"model": arguments.model, "dtype": arguments.dtype}
    return load_cluster(None, flags)


def _round(measured: Measured, slo: Slo) -> Round:
    return Round(by_kind(measured.records, slo), measured.usage, measured.workers)


# --- saying it -------------------------------------------------------------------------------------------------


def _about(arguments: argparse.Namespace, cluster: Cluster, mix: Mix, shots: Sequence[Shot]) -> dict[str, Any]:
    return rounds.environment(arguments.cores) | {
        "engine": arguments.engine,
        "model": model_name(cluster),
        "dtype": "-" if arguments.engine == "paced" else arguments.dtype,
        "paced": PACED if arguments.engine == "paced" else None,
        "rounds": arguments.rounds,
        "seconds": arguments.seconds,
        "seed": arguments.seed,
        "mix": mix,
        "num_requests": len(shots),
        "chunk": arguments.chunk,
        "slo": arguments.slo,
    }


def _say(turn: int, mode: str, found: Round) -> None:
    """One line a round, as it comes."""
    total = found.kinds["all"]
    note = "" if found.usage.valid else f"  NOT VALID: others took {found.usage.foreign + found.usage.steal:.0%}"
    errors = f"  ERRORS {total.errors}" if total.errors else ""
    print(f"round {turn + 1} {mode}: {total.num} requests, {total.tokens_per_s:.0f} tokens/s{errors}{note}", flush=True)


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table: a label, and the value in one round."""

    label: str
    value: Callable[[Round], float | None]


Read = Callable[[Summary], float | None]


def _of(kind: str, read: Read, scale: float = 1e3) -> Callable[[Round], float | None]:
    """A figure of one kind of request, in milliseconds."""

    def value(found: Round) -> float | None:
        figure = read(found.kinds[kind])
        return None if figure is None else figure * scale

    return value


def _quantile(what: str, quantile: str) -> Read:
    return lambda summary: getattr(getattr(summary, what), quantile)


def _rows(sample: Round) -> list[Row]:
    rows = []
    for kind in [kind for kind in ("chat", "long") if kind in sample.kinds]:
        summary = sample.kinds[kind]
        for what, name in (("ttft", "TTFT"), ("second", "token 1 to token 2"), ("itl", "ITL")):
            for quantile in ("p50", getattr(summary, what).tail[0]):
                rows.append(Row(f"{kind}: {name} {quantile}, ms", _of(kind, _quantile(what, quantile))))
        rows.append(Row(f"{kind}: worst 1 % of gaps, ms", _of(kind, lambda s: s.worst_gaps_s)))
        rows.append(Row(f"{kind}: longest stall, ms", _of(kind, lambda s: s.stall_s)))
    return [
        *rows,
        Row("answer tokens/s", _of("all", lambda s: s.tokens_per_s, 1)),
        Row("in SLO, %", _of("all", lambda s: s.num_good / max(s.num, 1), 100)),
        Row("errors", _of("all", lambda s: s.num_errors, 1)),
        Row("CPU of all processes, cores", lambda r: sum(use.busy for use in r.usage.processes.values())),
    ]


def _show(results: dict[str, list[Round]], about: dict[str, Any], markdown: bool) -> None:
    modes = list(results)
    base = results[modes[0]]
    kept = _kept(results)
    header = ["", *modes, *(f"{mode} ÷ {modes[0]}" for mode in modes[1:])]
    lines = []
    for row in _rows(base[0]):
        values = {mode: [row.value(found[i]) for i in kept] for mode, found in results.items()}
        cells = [rounds.spread(values[mode]) for mode in modes]
        cells += [rounds.ratios(values[mode], values[modes[0]]) for mode in modes[1:]]
        lines.append([row.label, *(cell.show() if cell else "-" for cell in cells)])
    print(_caption(about, len(kept), sum(map(len, results.values()))))
    rounds.print_table(header, lines, "median over rounds (least–most)", markdown)


def _kept(results: dict[str, list[Round]]) -> list[int]:
    """The rounds in which every mode had the machine to itself; all of them where there is no such round."""
    num = len(next(iter(results.values())))
    valid = [i for i in range(num) if all(found[i].usage.valid for found in results.values())]
    if len(valid) < num:
        print(f"\n{num - len(valid)} of {num} rounds had other processes on the cores (over {MAX_FOREIGN:.0%})", end="")
        print("; left out" if valid else "; with none left all are shown: do not believe them")
    return valid or list(range(num))


def _caption(about: dict[str, Any], num_rounds: int, num_runs: int) -> str:
    mix: Mix = about["mix"]
    return (
        f"\n{about['engine']} engine, model {about['model']}, {about['dtype']}; cores {about['cores']} of "
        f"{about['cpu']}; commit {about['commit']}, {about['when']}. Chats: {mix.rate:g}/s, prompt {mix.chat.prompt}, "
        f"answer {mix.chat.answer} tokens; a long prompt {mix.long.prompt} every {mix.long_every_s:g} s, answer "
        f"{mix.long.answer}. {about['seconds']:g} s, {about['num_requests']} requests, seed {about['seed']}, "
        f"{num_rounds} rounds of {num_runs} runs in turns. Chunk {about['chunk']} where chunked; SLO {about['slo']}."
    )


if __name__ == "__main__":
    sys.exit(main())
