"""Attention of decodes, verification steps and pieces of prompt: the native kernel against torch, in GB/s of KV.

    python benchmarks/attention.py [--threads 1,2] [--dtype bfloat16] [--rounds 7] [--clock cpu] [--out FILE]

Both take turns over the same pool, of as many layers as it takes to leave the caches; a round is every layer once. A
call stores the new keys and values and answers the queries, as in a model's step; laying a step out is timed apart.
"read" is how fast memory can be read by a plain sum over the same pool. Medians of the rounds, with least and most.
Of pieces of prompt (512 new tokens) only the ratio and the time mean something: they are bound by arithmetic; and where
the engine leaves them to torch (`kernels.multiplies_best`), both ways are torch's. Not responsible for whole models.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported

import numpy as np
import torch

from diptych.bench import rounds
from diptych.engine import attention
from diptych.engine.executor import Sampling
from diptych.engine.features import Features
from diptych.engine.sequence import Piece
from diptych.engine.sequence import Sequence as Tokens

POOL_BYTES = 256 << 20
clock = perf_counter
CASES = [
    (1, 1, 256),
    (1, 1, 1024),
    (8, 1, 256),
    (8, 1, 1024),
    (32, 1, 1024),
    (1, 1, 8192),
    (8, 5, 1024),
    (1, 512, 512),
    (1, 512, 2048),
]
"""(sequences, new tokens of each, tokens with them)."""


@dataclass(frozen=True, slots=True)
class Heads:
    """A model's shapes."""

    kv_heads: int
    group: int
    dim: int
    block_size: int
    dtype: torch.dtype


class Case:
    """One batch over a pool: pages of random numbers, blocks scattered."""

    def __init__(self, heads: Heads, num_sequences: int, count: int, length: int) -> None:
        width = -(-length // heads.block_size)
        self.layer_bytes = num_sequences * length * 2 * heads.kv_heads * heads.dim * heads.dtype.itemsize
        self.num_layers = max(2, min(POOL_BYTES // self.layer_bytes, 64))
        shape = (num_sequences * width, self.num_layers, 2, heads.kv_heads, heads.block_size, heads.dim)
        self.pages = torch.randn(shape, dtype=torch.float32).to(heads.dtype)
        tables = np.random.default_rng(0).permutation(num_sequences * width).astype(np.int32).reshape(-1, width)
        sequence = Tokens([0] * length, length, Sampling())
        self.pieces = [Piece(i, sequence, length - count, count, table, True) for i, table in enumerate(tables)]
        tokens = num_sequences * count
        self.query, self.key, self.value = (
            torch.randn(tokens, number, heads.dim).to(heads.dtype).transpose(0, 1)
            for number in (heads.kv_heads * heads.group, heads.kv_heads, heads.kv_heads)
        )
        self.features = Features(heads.dim**-0.5)

    def batch(self, native: bool) -> tuple[attention.Batch, float]:
        """The step laid out for one of the two, and how long that takes (the least of several), in seconds."""
        kv = attention.PagedKV(self.pages)
        if not native:
            kv.kernel = None
        elif kv.kernel is None:
            raise SystemExit("there is no native kernel here: nothing to compare")
        times = []
        for _ in range(20):
            begin = perf_counter()
            made = attention.lay_out(self.pieces, kv)
            times.append(perf_counter() - begin)
        return made, min(times)

    def run(self, batch: attention.Batch) -> None:
        """Every layer once."""
        for layer in range(self.num_layers):
            batch.attend(layer, self.query, self.key, self.value, self.features)

    def read(self) -> None:
        """Sum the pool as floats: as fast as memory can be read by this many threads, nearly."""
        self.pages.view(torch.float32).sum()


def measure(heads: Heads, shape: tuple[int, int, int], num_rounds: int) -> dict[str, Any]:
    """Compare on one batch; GB/s by way, round by round."""
    case = Case(heads, *shape)
    (native, native_s), (plain, plain_s) = case.batch(True), case.batch(False)
    kv_bytes = case.num_layers * case.layer_bytes
    ways: dict[str, tuple[Callable[[], None], int]] = {
        "native": (lambda: case.run(native), kv_bytes),
        "torch": (lambda: case.run(plain), kv_bytes),
        "read": (case.read, case.pages.numel() * heads.dtype.itemsize),
    }
    with torch.inference_mode():
        for way, _ in ways.values():
            way()
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for _, name in rounds.interleaved(list(ways), num_rounds):
            rates[name].append(_rate(*ways[name]))
    return {
        "shape": shape,
        "layers": case.num_layers,
        "layer_bytes": case.layer_bytes,
        "gb_per_s": rates,
        "lay_out_us": {"native": native_s * 1e6, "torch": plain_s * 1e6},
    }


def _rate(way: Callable[[], None], num_bytes: int) -> float:
    """GB/s, over enough repetitions to last 50 ms."""
    times, begin = 0, clock()
    while (spent := clock() - begin) < 0.05:
        way()
        times += 1
    return times * num_bytes / spent / 1e9 if times else 0.0


def row(found: dict[str, Any]) -> list[str]:
    """A case as a line of the table."""
    num, count, length = found["shape"]
    rates = found["gb_per_s"]
    ratio = rounds.ratios(rates["native"], rates["torch"])
    us = found["layer_bytes"] / 1e3 / np.median(rates["native"])
    spreads = [rounds.spread(rates[name]) for name in ("native", "torch", "read")]
    laid = found["lay_out_us"]
    return [
        f"{num} × {count} at {length}",
        *(s.show() for s in spreads if s),
        ratio.show() if ratio else "-",
        rounds.number(us),
        f"{laid['native']:.0f} / {laid['torch']:.0f}",
    ]


def main() -> int:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description="The native attention against torch.")
    parser.add_argument("--threads", default="1,2", help="one table for each")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--heads", default="4,4,64", help="KV heads, queries that share one, head size")
    parser.add_argument("--block", type=int, default=32, help="tokens of a block")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"], help="cpu: one thread, on a busy machine")
    parser.add_argument("--out", type=Path, help="JSON of everything measured")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    arguments = parser.parse_args()
    if arguments.clock == "cpu":
        global clock
        clock = thread_time
    kv_heads, group, dim = (int(text) for text in arguments.heads.split(","))
    heads = Heads(kv_heads, group, dim, arguments.block, getattr(torch, arguments.dtype))
    about = rounds.environment()
    print(f"commit {about['commit']}, {about['when']}, {about['cpu']}, torch {about['torch']}; {arguments.dtype}")
    results = []
    for threads in (int(text) for text in arguments.threads.split(",")):
        torch.set_num_threads(threads)
        found = [measure(heads, shape, arguments.rounds) for shape in CASES]
        results.append({"threads": threads, "cases": found})
        _show(threads, found, arguments.markdown)
    if arguments.out:
        rounds.write_json(
            arguments.out, {"about": about, "arguments": vars(arguments) | {"out": None}, "results": results}
        )
    return 0


def _show(threads: int, found: Sequence[dict[str, Any]], markdown: bool) -> None:
    header = [f"{threads} thread(s)", "native", "torch", "read", "ratio", "µs a layer", "lay-out, µs"]
    rounds.print_table(header, [row(case) for case in found], "GB/s of KV; ratio native to torch", markdown)


if __name__ == "__main__":
    sys.exit(main())
