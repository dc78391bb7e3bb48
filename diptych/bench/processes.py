"""CPU time of the processes of a benchmark, and of everybody else on the machine meanwhile (Linux, /proc).

A figure is only worth keeping if those who were measured got the cores: `Usage.foreign` says what share of the machine
others took, `Use.waited_s` how long a process was ready to run and did not. And what they hold: memory, files, threads
(`footprint`). Not responsible for what they computed.
"""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

_TICKS = os.sysconf("SC_CLK_TCK")
MAX_FOREIGN = 0.03  # of the machine's capacity; above that a round is not believed


class Use(msgspec.Struct, frozen=True):
    """What one process used of a span. `busy` is CPU time / wall time, over all its threads."""

    cpu_s: float
    busy: float
    waited_s: float  # runnable without a core, over all threads


class Usage(msgspec.Struct, frozen=True):
    """What a span of time saw. `foreign`, `steal`: shares of all cores that went elsewhere."""

    wall_s: float
    processes: dict[str, Use]
    foreign: float
    steal: float

    @property
    def valid(self) -> bool:
        """Nobody else took enough to matter."""
        return self.foreign + self.steal <= MAX_FOREIGN


@dataclass(frozen=True, slots=True)
class _Reading:
    wall_s: float
    cpu_s: dict[str, float]
    waited_s: dict[str, float]
    busy_s: float  # the whole machine
    steal_s: float


class Stopwatch:
    """Reads the counters when made, and again when asked."""

    def __init__(self, pids: Mapping[str, int]):
        self._pids = dict(pids)
        self._begin = self._read()

    def lap(self) -> Usage:
        """What was used since the beginning. A process that ended meanwhile is left out."""
        begin, end = self._begin, self._read()
        wall_s = max(end.wall_s - begin.wall_s, 1e-9)
        used = {
            name: Use(
                end.cpu_s[name] - begin.cpu_s[name],
                (end.cpu_s[name] - begin.cpu_s[name]) / wall_s,
                max(end.waited_s[name] - begin.waited_s[name], 0.0),
            )
            for name in self._pids
            if name in end.cpu_s and name in begin.cpu_s
        }
        capacity_s = wall_s * (os.cpu_count() or 1)
        ours_s = sum(use.cpu_s for use in used.values())
        foreign = max(end.busy_s - begin.busy_s - ours_s, 0.0) / capacity_s
        return Usage(wall_s, used, foreign, (end.steal_s - begin.steal_s) / capacity_s)

    def _read(self) -> _Reading:
        cpu_s, waited_s = {}, {}
        for name, pid in self._pids.items():
            try:
                cpu_s[name] = cpu_seconds(pid)
                waited_s[name] = _waited(pid)
            except OSError:
                cpu_s.pop(name, None)  # it ended
        user, nice, system, _, _, _, _, steal, *_ = (int(n) for n in _first_line("/proc/stat").split()[1:])
        return _Reading(time.monotonic(), cpu_s, waited_s, (user + nice + system) / _TICKS, steal / _TICKS)


def cpu_seconds(pid: int) -> float:
    """User and system time of a process, all threads, those that ended too."""
    # The second field is the program's name in parentheses, which may hold anything; the rest follows the last ")".
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


class Footprint(msgspec.Struct, frozen=True):
    """What a process holds at a moment. `anon_bytes` is its own memory, `shared_bytes` that of pools it maps."""

    rss_bytes: int
    pss_bytes: int
    anon_bytes: int
    shared_bytes: int
    num_fds: int
    num_threads: int


def footprint(pid: int) -> Footprint:
    """Read it from /proc. OSError where the process has ended."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)

    def num_bytes(key: str) -> int:
        return int(status[key].split()[0]) << 10

    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    pss_bytes = int(next(line for line in rollup.splitlines() if line.startswith("Pss:")).split()[1]) << 10
    rss_bytes, anon_bytes, shared_bytes = map(num_bytes, ("VmRSS", "RssAnon", "RssShmem"))
    num_fds = sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
    return Footprint(rss_bytes, pss_bytes, anon_bytes, shared_bytes, num_fds, int(status["Threads"]))


def _waited(pid: int) -> float:
    """Seconds its threads stood in a run queue; 0 where the kernel does not count that."""
    total_ns = 0
    for thread in Path(f"/proc/{pid}/task").iterdir():
        try:
            total_ns += int((thread / "schedstat").read_text().split()[1])
        except OSError:
            continue  # a thread that ended, or no such file
    return total_ns / 1e9


def _first_line(path: str) -> str:
    with open(path) as file:
        return file.readline()
