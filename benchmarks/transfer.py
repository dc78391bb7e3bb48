"""KV transports against a memcpy of the same bytes: GB/s, and CPU-seconds per GB of both sides together.

    python benchmarks/transfer.py [--mb 128] [--blocks 16,64,256] [--rounds 7] [--out FILE] [--markdown]

A source process has a pool; this one reads all of it, blocks in random order, over shared memory and over TCP on the
loopback interface, with and without verifying checksums. "raw" is the floor of TCP: one `sendall` from the pool and
`recv_into` ours, in order, nothing else. "memcpy" is the native block copy between two pools of this process. All take
turns; medians of the rounds, with least and most. The source's clock is its process's CPU clock, so its threads count.
Not responsible for networks: on the loopback interface both sides share caches and cores.
"""

import argparse
import asyncio
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from time import clock_gettime, perf_counter
from typing import Any

import numpy as np

from diptych.bench import rounds
from diptych.transfer import native
from diptych.transfer.layout import Layout
from diptych.transfer.pool import Pool
from diptych.transfer.reach import Transports
from diptych.transfer.seam import Peer, Plan

WAYS = ("memcpy", "shm", "shm+sum", "raw", "tcp", "tcp+sum")
RAW_BYTES = 4 << 20


def layout(block_kib: int) -> Layout:
    """Blocks of 16 tokens, one layer for every 4 KiB."""
    return Layout.uniform(layers=block_kib // 4, kv_heads=1, head_dim=64, block_size=16, dtype="bfloat16")


async def serve(folder: str, block_kib: int, num_blocks: int) -> None:
    """The source process: says what it offers, then lives until its input ends."""
    pool = Pool(layout(block_kib), num_blocks)
    pool.view[:] = np.random.default_rng(0).integers(0, 256, pool.view.shape, dtype=np.uint8)
    transports = Transports("source", 1, folder, "benchmark", "127.0.0.1:0")
    transports.register(pool)
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=_serve_raw, args=(listener, pool), daemon=True).start()
    print(transports.describe().hex(), listener.getsockname()[1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await transports.close()


def _serve_raw(listener: socket.socket, pool: Pool) -> None:
    sock, _ = listener.accept()
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    flat = memoryview(pool.view.reshape(-1))
    while sock.recv(1):
        for at in range(0, len(flat), RAW_BYTES):
            sock.sendall(flat[at : at + RAW_BYTES])


class Bench:
    """The reading side, for one size of blocks."""

    def __init__(self, process: "subprocess.Popen[str]", pool: Pool, port: int) -> None:
        self.process, self.pool = process, pool
        self.other = Pool(pool.layout, pool.num_blocks)
        rng = np.random.default_rng(1)
        self.source, self.target = (rng.permutation(pool.num_blocks).astype(np.int32) for _ in range(2))
        self.peers: dict[str, Peer] = {}
        self.raw = socket.create_connection(("127.0.0.1", port))

    async def memcpy(self) -> None:
        """The same blocks between two pools of this process."""
        native.copy_blocks(self.pool.view, self.other.view, self.target, self.source)

    async def read_raw(self) -> None:
        """The same number of bytes over a socket, in order."""
        await asyncio.to_thread(self._read_raw)

    def _read_raw(self) -> None:
        self.raw.sendall(b"x")
        flat = memoryview(self.pool.view.reshape(-1))
        at = 0
        while at < len(flat):
            at += self.raw.recv_into(flat[at : at + (1 << 19)])

    async def read(self, lane: str, sums: np.ndarray | None) -> None:
        """A transport's read."""
        await self.peers[lane].read(Plan(self.source, self.target, sums), 60).done()

    def ways(self, sums: np.ndarray) -> dict[str, Callable[[], Awaitable[None]]]:
        """What is compared, by name."""
        return {
            "memcpy": self.memcpy,
            "shm": lambda: self.read("shm", None),
            "shm+sum": lambda: self.read("shm", sums),
            "raw": self.read_raw,
            "tcp": lambda: self.read("tcp", None),
            "tcp+sum": lambda: self.read("tcp", sums),
        }

    def clock(self) -> float:
        """CPU seconds of both processes so far."""
        return sum(clock_gettime((~pid << 3) | 2) for pid in (0, self.process.pid))  # CPUCLOCK_SCHED of a process


async def measure(folder: str, block_kib: int, num_bytes: int, num_rounds: int) -> dict[str, Any]:
    """Compare with blocks of one size: GB/s and CPU-seconds per GB by way, round by round."""
    num_blocks = num_bytes // (block_kib << 10)
    command = [sys.executable, __file__, "--serve", folder, str(block_kib), str(num_blocks)]
    pool = Pool(layout(block_kib), num_blocks)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdin is not None
        described, port = process.stdout.readline().split()
        bench = Bench(process, pool, int(port))
        transports = {lane: Transports(f"reader-{lane}", 1, folder, "benchmark", None) for lane in ("shm",)}
        transports["tcp"] = Transports("reader-tcp", 1, folder, "benchmark", "127.0.0.1:0", force="tcp")
        for lane, transport in transports.items():
            transport.register(pool)
            bench.peers[lane] = peer = await transport.connect(bytes.fromhex(described))
            assert peer.lane == lane
        await bench.read("shm", None)
        sums = transports["shm"].checksum(bench.target)  # of what was read, in the order of the plan
        found = await _rounds(bench, bench.ways(sums), num_rounds, pool.view.size / 1e9)
        for transport in transports.values():
            await transport.close()
        bench.raw.close()
        process.stdin.close()
    return {"block_kib": block_kib, "num_blocks": num_blocks, **found}


async def _rounds(
    bench: Bench, ways: dict[str, Callable[[], Awaitable[None]]], num_rounds: int, gigabytes: float
) -> dict[str, Any]:
    for way in ways.values():
        await way()
    rates: dict[str, list[float]] = {name: [] for name in ways}
    costs: dict[str, list[float]] = {name: [] for name in ways}
    for _, name in rounds.interleaved(WAYS, num_rounds):
        begin, cpu = perf_counter(), bench.clock()
        await ways[name]()
        rates[name].append(gigabytes / (perf_counter() - begin))
        costs[name].append((bench.clock() - cpu) / gigabytes)
    return {"gb_per_s": rates, "cpu_s_per_gb": costs}


def table(found: dict[str, Any]) -> list[list[str]]:
    """A size of blocks as lines of the table."""
    lines = []
    for name in WAYS:
        rate, cost = (rounds.spread(found[key][name]) for key in ("gb_per_s", "cpu_s_per_gb"))
        ratio = rounds.ratios(found["cpu_s_per_gb"][name], found["cpu_s_per_gb"]["memcpy"])
        least = min(found["cpu_s_per_gb"][name])
        assert rate and cost and ratio
        lines.append([f"{found['block_kib']} KiB", name, rate.show(), cost.show(), rounds.number(least), ratio.show()])
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description="KV transports against a memcpy.")
    parser.add_argument("--mb", type=int, default=128, help="size of the pool, and of every read")
    parser.add_argument("--blocks", default="16,64,256", help="sizes of blocks in KiB")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="JSON of everything measured")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.serve:
        folder, block_kib, num_blocks = arguments.serve
        asyncio.run(serve(folder, int(block_kib), int(num_blocks)))
        return 0
    about = rounds.environment()
    print(f"commit {about['commit']}, {about['when']}, {about['cpu']}, load {about['load_average']}; {arguments.mb} MB")
    results = []
    with tempfile.TemporaryDirectory(prefix="kv") as folder:
        for block_kib in (int(text) for text in arguments.blocks.split(",")):
            results.append(asyncio.run(measure(f"{folder}/run", block_kib, arguments.mb << 20, arguments.rounds)))
    header = ["blocks", "way", "GB/s", "CPU s/GB, both sides", "least", "CPU, × memcpy"]
    rows = [line for found in results for line in table(found)]
    rounds.print_table(header, rows, "KV reads on one host", arguments.markdown)
    if arguments.out:
        said = {"about": about, "arguments": vars(arguments) | {"out": None}, "results": results}
        rounds.write_json(arguments.out, said)
    return 0


if __name__ == "__main__":
    sys.exit(main())
