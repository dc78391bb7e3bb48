"""What several modes made of the same load: a table of medians and ratios, and in a sentence what is gained and lost.

A difference counts only where the rounds of the two do not overlap and the medians are 5 % apart; what is less than
that is not called one. Not responsible for running anything (`compare.py`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import log
from statistics import median
from typing import Any

from diptych.bench import rounds
from diptych.bench.client import Record
from diptych.bench.clusters import Measured
from diptych.bench.processes import MAX_FOREIGN, Usage
from diptych.bench.report import Summary, by_kind
from diptych.bench.slo import Slo

ENOUGH = 1.05  # medians closer than that are called the same


@dataclass(frozen=True, slots=True)
class Round:
    """One mode under the load once."""

    kinds: dict[str, Summary]
    usage: Usage
    workers: list[dict[str, Any]]
    records: list[Record]

    @classmethod
    def of(cls, measured: Measured, slo: Slo) -> "Round":
        """From what was measured."""
        return cls(by_kind(measured.records, slo), measured.usage, measured.workers, measured.records)

    @property
    def total(self) -> Summary:
        """Of all requests."""
        return self.kinds["all"]

    @property
    def focus(self) -> str:
        """The kind of request whose readers would notice: chats, where they are told apart."""
        return "chat" if "chat" in self.kinds else "all"

    @property
    def line(self) -> str:
        """How it went, as it comes."""
        total, usage = self.total, self.usage
        note = "" if usage.valid else f"  NOT VALID: others took {usage.foreign + usage.steal:.0%}"
        errors = f"  ERRORS {total.errors}" if total.errors else ""
        return f"{total.num} requests, {total.tokens_per_s:.0f} tokens/s{errors}{note}"


Found = dict[str, list[Round]]
Value = Callable[[Round], float | None]


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the table. better: -1 where less is better, 1 where more is, 0 where it is neither."""

    label: str
    value: Value
    better: int = -1


def show(found: Found, about: dict[str, Any], markdown: bool) -> None:
    """Print the table and the sentences."""
    kept = kept_rounds(found)
    num_rounds = len(next(iter(found.values())))
    print(_caption(about, len(kept), num_rounds * len(found)))
    if len(kept) < num_rounds:
        left_out = num_rounds - len(kept)
        print(f"{left_out} of {num_rounds} rounds left out: others took over {MAX_FOREIGN:.0%} of the machine")
    elif not all(each.usage.valid for some in found.values() for each in some):
        print("Others were on the cores in every round: all are shown, do not believe them.")
    rounds.print_table(*_table(found, kept), title="median over rounds (least–most)", markdown=markdown)
    for line in verdicts(found):
        print(line)


def kept_rounds(found: Found) -> list[int]:
    """The rounds in which every mode had the machine to itself; all of them where there is no such round."""
    num = len(next(iter(found.values())))
    valid = [i for i in range(num) if all(some[i].usage.valid for some in found.values())]
    return valid or list(range(num))


def verdicts(found: Found) -> Iterator[str]:
    """For each mode but the first: what it gains over the first and what that costs; says so where it is nothing."""
    base, *others = found
    kept = kept_rounds(found)
    figures = [figure for figure in figures_of(found[base][0], "") if figure.better]
    for mode in others:
        mine, theirs = ([found[one][i] for i in kept] for one in (mode, base))
        known = [(figure, ratio) for figure in figures if (ratio := _difference(figure, mine, theirs)) is not None]
        known.sort(key=lambda pair: -abs(log(pair[1])))
        gains, costs = ([_say(*pair) for pair in known if _gained(*pair) == good] for good in (True, False))
        yield _sentence(mode, base, gains, costs)
    if len(kept) < 3:
        yield f"{len(kept)} round(s) are too few to tell a difference from chance: use --rounds 3 or more."


def _gained(figure: Figure, ratio: float) -> bool:
    return (ratio > 1) == (figure.better > 0)


def _say(figure: Figure, ratio: float) -> str:
    return f"{figure.label.partition(',')[0]} {rounds.number(ratio)}x"


def _sentence(mode: str, base: str, gains: list[str], costs: list[str]) -> str:
    if not gains and not costs:
        return f"{mode} against {base}: no difference beyond what rounds of one mode differ by. Nothing gained here."
    if not gains:
        return f"{mode} against {base}: nothing gained here; it costs {', '.join(costs)}."
    price = f"; the price: {', '.join(costs)}" if costs else ", at no price seen here"
    return f"{mode} against {base}: {', '.join(gains)}{price}."


def _difference(figure: Figure, mine: Sequence[Round], base: Sequence[Round]) -> float | None:
    """The ratio of medians, where it can be told from chance."""
    ours, theirs = ([v for v in map(figure.value, some) if v is not None] for some in (mine, base))
    if not ours or not theirs or min(median(ours), median(theirs)) <= 0:
        return None
    ratio = median(ours) / median(theirs)
    apart = max(ours) < min(theirs) or min(ours) > max(theirs)
    return ratio if apart and not 1 / ENOUGH < ratio < ENOUGH else None


def to_json(found: Found, about: dict[str, Any]) -> dict[str, Any]:
    """Everything but the single requests."""
    return {
        "about": about,
        "rounds": {
            mode: [{"kinds": one.kinds, "usage": one.usage, "workers": one.workers} for one in some]
            for mode, some in found.items()
        },
        "verdicts": list(verdicts(found)),
    }


# --- the table -------------------------------------------------------------------------------------------------


def figures_of(sample: Round, prefix: str | None = None) -> Iterator[Figure]:
    """The lines of the table. prefix None: for every kind, by name; "": only for the one that matters most."""
    kinds = [kind for kind in sample.kinds if kind != "all"] or ["all"]
    for kind in kinds if prefix is None else [sample.focus]:
        yield from _latencies(kind, sample.kinds[kind], f"{kind}: " if prefix is None else prefix)
    yield Figure("answer tokens/s", _of("all", lambda s: s.tokens_per_s, 1), 1)
    yield Figure("in SLO, %", _of("all", lambda s: s.num_good / max(s.num, 1), 100), 1)
    yield Figure("errors", _of("all", lambda s: s.num_errors, 1), 0)
    yield Figure("CPU of all processes, cores", lambda r: sum(use.busy for use in r.usage.processes.values()))


def _latencies(kind: str, summary: Summary, prefix: str) -> Iterator[Figure]:
    for what, name in (("ttft", "TTFT"), ("second", "token 1 to token 2"), ("itl", "ITL"), ("tpot", "TPOT")):
        for quantile in ("p50", getattr(summary, what).tail[0]):
            yield Figure(f"{prefix}{name} {quantile}, ms", _of(kind, _quantile(what, quantile)))
    yield Figure(f"{prefix}worst 1 % of gaps, ms", _of(kind, lambda s: s.worst_gaps_s))
    yield Figure(f"{prefix}longest stall, ms", _of(kind, lambda s: s.stall_s))


def _of(kind: str, read: Callable[[Summary], float | None], scale: float = 1e3) -> Value:
    """A figure of one kind of request, in milliseconds."""

    def value(found: Round) -> float | None:
        figure = read(found.kinds[kind])
        return None if figure is None else figure * scale

    return value


def _quantile(what: str, quantile: str) -> Callable[[Summary], float | None]:
    return lambda summary: getattr(getattr(summary, what), quantile)


def _table(found: Found, kept: Sequence[int]) -> tuple[list[str], list[list[str]]]:
    modes = list(found)
    base = modes[0]
    lines = []
    for figure in figures_of(found[base][0]):
        values = {mode: [figure.value(some[i]) for i in kept] for mode, some in found.items()}
        cells = [rounds.spread(values[mode]) for mode in modes]
        cells += [rounds.ratios(values[mode], values[base]) for mode in modes[1:]]
        lines.append([figure.label, *(cell.show() if cell else "-" for cell in cells)])
    return ["", *modes, *(f"{mode} ÷ {base}" for mode in modes[1:])], lines


def _caption(about: dict[str, Any], num_rounds: int, num_runs: int) -> str:
    return (
        f"\n{about['engine']} engine, model {about['model']}, {about['dtype']}; {about['workers']} workers, cores "
        f"{about['cores']} of {about['cpu']}; commit {about['commit']}, {about['when']}. {about['load']}; "
        f"{about['seconds']:g} s, {about['num_requests']} requests, seed {about['seed']}, {num_rounds} rounds of "
        f"{num_runs} runs in turns. Chunk {about['chunk']} where chunked; SLO {about['slo']}."
    )
