"""What the front end costs for each token, and whether a flood of connections disturbs it.

    python benchmarks/front_end.py [--streams 64] [--tokens 400] [--rounds 3] [--flood 2000] [--chat] [--out FILE]

A live cluster: real processes and sockets, a paced engine, the bundled tokenizer. First the CPU time of the API process
(user and system, all its threads) for each streamed token, while that many streams run at once and are read by another
process. Then a flood: connections that say nothing, that send their head a byte at a time, that promise a body and
send half of it, and requests whose client leaves; `/health` is timed meanwhile and real streams must all complete.
Afterwards descriptors, requests and blocks must be where they were. Exit status 1 where something leaks, blocks or
fails. Not responsible for what workers cost, nor for latency under load (`diptych.bench`).
"""

import argparse
import asyncio
import contextlib
import http.client
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from diptych.bench.client import Client, Record, completion
from diptych.bench.processes import Stopwatch, cpu_seconds
from diptych.config import load_cluster
from diptych.serve.supervisor import Supervisor

HOST = "127.0.0.1"
PACED = {"base_ms": 15.0, "new_token_us": 1.0, "context_token_us": 0.001, "kv_bytes_per_token": 8, "vocab": 1800}
SLOW_HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nx-slow: "
HALF_BODY = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n" + b'{"prompt": '
LEAK_MIB = 8.0
IDLE_S = 45.0  # the server hangs up on idlers at its second look, ten seconds apart


def main() -> int:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description="The cost of the front end, and a flood of it.")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=400, help="of each stream")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--flood", type=int, default=2000, help="connections; 0: no flood")
    parser.add_argument("--chat", action="store_true", help="chat completions instead of completions")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--load", help=argparse.SUPPRESS)  # the reader's own process: PORT
    parser.add_argument("--probe", nargs=2, type=int, help=argparse.SUPPRESS)  # the prober's: PORT TIMES
    arguments = parser.parse_args()
    if arguments.probe:
        return _probe(*arguments.probe)
    if arguments.load:
        return asyncio.run(_read_streams(int(arguments.load), arguments))
    flags = {"prefill": 1, "decode": 1, "engine": "paced", "port": 0, "paced": PACED, "log_level": "warning"}
    found: dict[str, Any] = {}
    with Supervisor(load_cluster(None, flags)) as cluster:
        cluster.wait_ready()
        found["streams"] = per_token(cluster, arguments)
        if arguments.flood:
            found["floods"] = [asyncio.run(flood(cluster, arguments.flood)) for _ in range(2)]
    if arguments.out:
        arguments.out.write_bytes(msgspec.json.format(msgspec.json.encode(found)))
    if not arguments.flood:
        return 0
    # The first flood may take memory that stays, for so many connections at once; the second finds it there.
    first, second = (result["rss_mib"]["after"] for result in found["floods"])
    print(f"memory after the floods: {first} and {second} MiB")
    return 0 if second - first < LEAK_MIB and all(result["well"] for result in found["floods"]) else 1


# --- what a token costs ----------------------------------------------------------------------------------------


def per_token(cluster: Supervisor, arguments: argparse.Namespace) -> dict[str, Any]:
    """CPU microseconds of the API process for each token, of every round."""
    pid = next(child.process.pid for child in cluster.children if child.name == "api" and child.process)
    command = [sys.executable, __file__, "--load", str(cluster.port), "--streams", str(arguments.streams)]
    command += ["--tokens", str(arguments.tokens), *(["--chat"] if arguments.chat else [])]
    costs = []
    for number in range(arguments.rounds + 1):
        begin_s, cpu_s = time.monotonic(), cpu_seconds(pid)
        tokens = int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        wall_s, used_s = time.monotonic() - begin_s, cpu_seconds(pid) - cpu_s
        if number:  # the first warms up
            costs.append(1e6 * used_s / tokens)
            print(
                f"{arguments.streams} streams, {tokens} tokens, {tokens / wall_s:.0f}/s: "
                f"{costs[-1]:.1f} us of the API process's CPU for each token",
                flush=True,
            )
    print(f"median {statistics.median(costs):.1f} us (least {min(costs):.1f}, most {max(costs):.1f})", flush=True)
    return {"us_per_token": costs, "streams": arguments.streams, "chat": arguments.chat}


async def _read_streams(port: int, arguments: argparse.Namespace) -> int:
    client = Client(HOST, port, "/v1/chat/completions" if arguments.chat else "/v1/completions")
    bodies = [_body(i, arguments.tokens, arguments.chat) for i in range(arguments.streams)]
    await client.warm(len(bodies))
    records = await asyncio.gather(*(client.send(body, Record(max_tokens=arguments.tokens)) for body in bodies))
    await client.close()
    errors = {record.error for record in records if record.error}
    assert not errors, errors
    print(sum(record.num_tokens for record in records))
    return 0


def _body(number: int, tokens: int, chat: bool) -> bytes:
    if not chat:
        return completion([(31 * number + i) % 256 for i in range(40)], tokens)
    whole: dict[str, Any] = json.loads(completion("", tokens))
    del whole["prompt"]
    return msgspec.json.encode(whole | {"messages": [{"role": "user", "content": f"Count from {number}"}]})


# --- a flood ---------------------------------------------------------------------------------------------------


async def flood(cluster: Supervisor, num: int) -> dict[str, Any]:
    """Open `num` connections of four kinds, and see what becomes of everybody else."""
    pid = next(child.process.pid for child in cluster.children if child.name == "api" and child.process)
    calm = await _health_times(cluster.port, 40)
    before = num_fds(pid), rss_mib(pid)
    client = Client(HOST, cluster.port)
    streams = [asyncio.ensure_future(client.send(_body(i, 200, False), Record(max_tokens=200))) for i in range(8)]
    opening = [asyncio.ensure_future(_misbehave(cluster.port, number)) for number in range(num)]
    stopwatch = Stopwatch({"api": pid})
    during = await _health_times(cluster.port, 100)
    writers = [writer for writer in await asyncio.gather(*opening) if writer is not None]
    peak = num_fds(pid)
    during += await _health_times(cluster.port, 40)
    used = stopwatch.lap().processes["api"]
    records = await asyncio.gather(*streams)
    await client.close()
    hung_up = await _until(lambda: num_fds(pid) <= before[0] + num // 4 + 4, IDLE_S)
    for writer in writers:
        writer.close()
    gone = await _until(lambda: num_fds(pid) <= before[0], 10.0)
    home = await _until(lambda: at_home(cluster.port), 10.0)
    result = {
        "connections": num,
        "health_calm_ms": _ms(calm),
        "health_flood_ms": _ms(during),
        # What it worked, and what it stood ready without a core: the flood is made on the same machine.
        "api_cpu_s": round(used.cpu_s, 2),
        "api_waited_s": round(used.waited_s, 2),
        "streams_complete": sum(not record.error and record.num_tokens == 200 for record in records),
        "fds": {"before": before[0], "peak": peak, "after": num_fds(pid)},
        "rss_mib": {"before": before[1], "after": rss_mib(pid)},
        "idlers_hung_up_on": hung_up,
        "all_at_home": home,
        "well": hung_up and gone and home and all(not record.error for record in records),
    }
    print(msgspec.json.format(msgspec.json.encode(result)).decode(), flush=True)
    return result


async def _misbehave(port: int, number: int) -> asyncio.StreamWriter | None:
    """One connection of the flood; None where it is over already."""
    reader, writer = await asyncio.open_connection(HOST, port)
    kind = number % 4
    if kind == 1:
        for byte in SLOW_HEAD:
            writer.write(bytes([byte]))
            await asyncio.sleep(0.05)
    elif kind == 2:
        writer.write(HALF_BODY)
    elif kind == 3:
        body = _body(number, 500, False)
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(reader.read(100), 0.5)
        writer.close()
        return None
    return writer


async def _health_times(port: int, num: int) -> list[float]:
    """Seconds of each probe, by a process of its own: the flood is made in this one."""
    command = [sys.executable, __file__, "--probe", str(port), str(num)]
    done = await asyncio.to_thread(subprocess.run, command, check=True, stdout=subprocess.PIPE)
    times: list[float] = json.loads(done.stdout)
    return times


def _probe(port: int, num: int) -> int:
    times = []
    for _ in range(num):
        begin_s = time.perf_counter()
        status, _ = _get(port, "/health")
        times.append(time.perf_counter() - begin_s)
        assert status == 200, status
        time.sleep(0.02)
    print(json.dumps(times))
    return 0


def _get(port: int, path: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(HOST, port, timeout=10)
    try:
        connection.request("GET", path)
        reply = connection.getresponse()
        return reply.status, json.loads(reply.read())
    finally:
        connection.close()


def at_home(port: int) -> bool:
    """No worker knows of any request, and every block is free or cached."""
    rows = _get(port, "/workers")[1]["workers"]
    return all(
        row["requests"] == 0 and sum(row["blocks"].values()) == row["blocks"]["free"] + row["blocks"]["cached"]
        for row in rows
    )


async def _until(true: Any, limit_s: float) -> bool:
    deadline = time.monotonic() + limit_s
    while not (held := await asyncio.to_thread(true)) and time.monotonic() < deadline:
        await asyncio.sleep(0.1)
    return bool(held)


def num_fds(pid: int) -> int:
    """Open descriptors of a process."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def rss_mib(pid: int) -> float:
    """Resident memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)


def _ms(times: list[float]) -> dict[str, float]:
    ordered = sorted(times)
    worst, p90 = ordered[-1], ordered[int(0.9 * len(ordered))]
    return {
        "median": round(1e3 * statistics.median(times), 2),
        "p90": round(1e3 * p90, 2),
        "most": round(1e3 * worst, 2),
    }


if __name__ == "__main__":
    sys.exit(main())
