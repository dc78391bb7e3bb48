"""A load in the words of the command line: the flags that `simulate`, `bench` and `compare` share, and its arrivals.

Who is asked is not its business: the same arrivals go to the simulator and, as prompts, to a server (`bench/load.py`).
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice, takewhile
from math import inf
from pathlib import Path
from typing import Any

from diptych.errors import ConfigError
from diptych.sim.workload import Arrival, Lengths, Workload, generate, merge, parse_lengths

_OTHER_SEED = 1 << 14  # long prompts have their own seed, so that chats are the same with and without them


@dataclass(frozen=True, slots=True)
class Load:
    """Chats at `rate` per second and a long prompt every `long_every_s`, or what a trace says; up to a limit."""

    rate: float = 1.0
    burstiness: float = 1.0
    prompt: Lengths = Lengths(512)
    output: Lengths = Lengths(128)
    long_every_s: float = 0.0
    long_prompt: Lengths = Lengths(3000, "uniform", 1 / 3)
    long_output: Lengths = Lengths(24, "uniform", 1 / 3)
    trace: Path | None = None
    time_scale: float = 1.0
    length_scale: float = 1.0
    max_prompt: int | None = None
    requests: int | None = None
    seconds: float = inf
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("burstiness", "time_scale", "length_scale", "seconds"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"--{name.replace('_', '-')} is more than 0")
        for name in ("requests", "max_prompt"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} is at least 1")
        if not (min(self.rate, self.long_every_s) >= 0 and max(self.rate, self.long_every_s, bool(self.trace)) > 0):
            raise ConfigError("nobody would ask anything: raise --rate or --long-every")
        if self.requests is None and self.seconds == inf and self.trace is None:
            raise ConfigError("a load without an end: give --requests or --seconds")

    def arrivals(self, block_size: int = 16) -> Iterator[Arrival]:
        """Everyone who asks, in order of time; the same for the same load."""
        return takewhile(lambda arrival: arrival.time_s < self.seconds, self.requested(block_size))

    def requested(self, block_size: int = 16) -> Iterator[Arrival]:
        """The same for those who do not heed times (a closed loop): as many as may be asked for, without end else."""
        return islice(self._endless(block_size), self.requests)

    def __str__(self) -> str:
        """For captions."""
        if self.trace is not None:
            scaled = f"times x {self.time_scale:g}, lengths x {self.length_scale:g}"
            return f"{self.trace.name}, {scaled}" + (f", prompts up to {self.max_prompt}" if self.max_prompt else "")
        bursts = "" if self.burstiness == 1 else f" (burstiness {self.burstiness:g})"
        asked = f"{self.rate:g} requests/s{bursts}, prompt {self.prompt}, answer {self.output} tokens"
        if not self.long_every_s:
            return asked
        return f"{asked}; a prompt of {self.long_prompt} every {self.long_every_s:g} s, answer {self.long_output}"

    def _endless(self, block_size: int) -> Iterator[Arrival]:
        if self.trace is not None:
            from diptych.sim.trace import Scale, read_trace, replayed  # numpy, which a command's start can do without

            return replayed(
                read_trace(self.trace), Scale(self.time_scale, self.length_scale, self.max_prompt), block_size
            )
        streams = [generate(workload, seed) for workload, seed in self._workloads(block_size)]
        return merge(*streams)

    def _workloads(self, block_size: int) -> Iterator[tuple[Workload, int]]:
        if self.rate > 0:
            prompt = self._cut(self.prompt)
            yield (
                Workload(self.rate, prompt, self.output, block_size=block_size, burstiness=self.burstiness),
                self.seed,
            )
        if self.long_every_s > 0:
            rate, half = 1 / self.long_every_s, -self.long_every_s / 2
            long = Workload(rate, self._cut(self.long_prompt), self.long_output, block_size=block_size)
            yield replace(long, start_s=half, burstiness=inf, kind="long"), self.seed + _OTHER_SEED

    def _cut(self, lengths: Lengths) -> Lengths:
        return replace(lengths, limit=min(self.max_prompt or lengths.limit, lengths.limit))


def _lengths(text: str) -> Lengths:
    try:
        return parse_lengths(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_load_flags(
    parser: argparse.ArgumentParser, *, rate: float, prompt: str, output: str, seed: int, long_every: float = 0.0
) -> None:
    """The flags of a load, with the defaults of a command. `load_of` reads them."""

    def flag(name: str, kind: Callable[[str], Any], default: Any, metavar: str, text: str) -> None:
        shown = "" if default is None else f" ({default})"
        parser.add_argument(f"--{name}", type=kind, default=default, metavar=metavar, help=text + shown)

    flag("rate", float, rate, "R", "requests per second")
    flag("burstiness", float, 1.0, "B", "shape of the gamma distribution of gaps: 1 is Poisson, less is burstier")
    flag("prompt", _lengths, prompt, "LENGTHS", "tokens of prompts: 512, 64-200 or ~512")
    flag("output", _lengths, output, "LENGTHS", "tokens of answers, likewise")
    flag("long-every", float, long_every, "S", "seconds between long prompts; 0: none")
    flag("long-prompt", _lengths, "2000-4000", "LENGTHS", "tokens of long prompts")
    flag("long-output", _lengths, "16-32", "LENGTHS", "tokens of their answers")
    flag("trace", Path, None, "FILE", "a recorded load instead: Azure's CSV or Mooncake's JSONL")
    flag("time-scale", float, 1.0, "X", "multiply a trace's times: 0.5 is twice as fast")
    flag("length-scale", float, 1.0, "X", "multiply a trace's lengths")
    flag("max-prompt", int, None, "N", "cut longer prompts")
    flag("requests", int, None, "N", "how many requests at most")
    flag("seconds", float, None, "S", "for how long requests are sent at most")
    flag("seed", int, seed, "N", "same seed, same load")


def load_of(arguments: argparse.Namespace, **otherwise: Any) -> Load:
    """The load of parsed flags; `otherwise` is its limit where no flag sets one. ConfigError for what cannot be."""
    limits = {"requests": arguments.requests, "seconds": arguments.seconds}
    given = {name: value for name, value in limits.items() if value is not None}
    return Load(
        rate=arguments.rate,
        burstiness=arguments.burstiness,
        prompt=arguments.prompt,
        output=arguments.output,
        long_every_s=arguments.long_every,
        long_prompt=arguments.long_prompt,
        long_output=arguments.long_output,
        trace=arguments.trace,
        time_scale=arguments.time_scale,
        length_scale=arguments.length_scale,
        max_prompt=arguments.max_prompt,
        seed=arguments.seed,
        **(given or otherwise),
    )
