"""Comparing things in one run: interleaved rounds, medians with their spread, ratios round by round, tables.

A figure varies from run to run and from machine to machine; what is compared within one run, in turns, varies less. The
spread of a thing against itself over the rounds says how much less. Not responsible for measuring.
"""

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from diptych.errors import ConfigError


class Spread(msgspec.Struct, frozen=True):
    """The median of some rounds, the least and the most."""

    median: float
    low: float
    high: float

    def show(self, digits: int = 3) -> str:
        """`median (low-high)`, so many significant digits."""
        if self.low == self.high:
            return number(self.median, digits)
        return f"{number(self.median, digits)} ({number(self.low, digits)}–{number(self.high, digits)})"


def spread(values: Sequence[float | None]) -> Spread | None:
    """The spread of the rounds that have a value."""
    found = [value for value in values if value is not None]
    return Spread(statistics.median(found), min(found), max(found)) if found else None


def ratios(mine: Sequence[float | None], base: Sequence[float | None]) -> Spread | None:
    """The spread of mine / base, round by round."""
    return spread([m / b if m is not None and b else None for m, b in zip(mine, base, strict=False)])


def number(value: float, digits: int = 3) -> str:
    """A number with so many significant digits, never in scientific notation."""
    if value == 0:
        return "0"
    whole = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    return f"{value:.{max(digits - whole, 0)}f}"


def interleaved(names: Sequence[str], num_rounds: int) -> Iterator[tuple[int, str]]:
    """A B C, A B C, ...: (round, name)."""
    for turn in range(num_rounds):
        for name in names:
            yield turn, name


def environment(cores: Sequence[int] | None = None) -> dict[str, Any]:
    """What a figure needs beside it to mean something."""
    return {
        "commit": _commit(),
        "when": time.strftime("%Y-%m-%d"),
        "cpu": _cpu_name(),
        "cores": list(cores) if cores else sorted(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": _version("torch"),
        "load_average": round(os.getloadavg()[0], 2),
    }


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], title: str, markdown: bool) -> None:
    """Print a table for people, or one to paste into a page."""
    if markdown:
        print("\n".join(["", "| " + " | ".join(header) + " |", "|" + "---|" * len(header)]))
        print("\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n")
        return
    table = Table(*header, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    Console(width=max(Console().width, 120)).print(table)


def check_folders(*paths: Path | None) -> None:
    """ConfigError, before minutes are spent, where a file is to be in a folder that is not there."""
    for path in paths:
        if path is not None and not path.parent.is_dir():
            raise ConfigError(f"{path}: there is no folder {path.parent}")


def write_json(path: Path, value: Any) -> None:
    """Keep the figures."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n")


def _commit() -> str:
    """The commit of the code that runs, with "+" where files differ from it."""
    where = Path(__file__).parent

    def git(*arguments: str) -> str:
        found = subprocess.run(["git", *arguments], cwd=where, capture_output=True, text=True, check=False)
        return found.stdout.strip()

    try:
        head = git("rev-parse", "--short", "HEAD")
        return head + ("+" if head and git("status", "--porcelain") else "") or "unknown"
    except OSError:
        return "unknown"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
