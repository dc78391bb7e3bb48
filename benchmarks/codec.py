"""int8 on the wire: what it costs, what it loses, on which links it pays, and whether the rule knows.

    python benchmarks/codec.py [--parts speed,quality,links] [--rounds 41] [--mb 4] [--questions 60] [--out FILE]

speed: GB of KV per CPU-second, both ways, native, from memory larger than the caches; ratio and error on normal rows.
quality: the bundled model. Perplexity of the second halves of texts whose first halves' KV crossed as int8, or raw; and
exact recall from notes through a live pair over TCP. links: reads of `--mb` over emulated links around the predicted
break-even, raw, int8 and auto in turns. A link's rate is what raw reads show, and what the rule goes by; on the
loopback interface that is less than what is emulated. The measured break-even is the rate at which raw and int8 take
the same time, between the two links around it. Times are medians, ratios medians of the turns' ratios. The source is a
process of its own. Not responsible for networks.
"""

import argparse
import asyncio
import math
import random
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from operator import truediv
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np

from diptych.bench import rounds
from diptych.demo.chat import story
from diptych.demo.notes import make_notes
from diptych.transfer.codec import Chooser, rows_of
from diptych.transfer.emulated import EmulatedTransport
from diptych.transfer.layout import Layout
from diptych.transfer.native import int8
from diptych.transfer.pool import Pool
from diptych.transfer.seam import Plan, Wish
from diptych.transfer.tcp import TcpTransport

DTYPES = ("float32", "bfloat16", "float16")
WAYS: dict[str, Wish] = {"raw": "raw", "int8": "int8", "auto": "auto", "raw again": "raw"}  # the last: the noise


def layout(dtype: str) -> Layout:
    """Blocks of 16 tokens, eight layers of four heads of 64."""
    return Layout.uniform(layers=8, kv_heads=4, head_dim=64, block_size=16, dtype=dtype)


def fill(pool: Pool) -> None:
    """Normal values, rows of different sizes."""
    shape = rows_of(pool.layout)
    assert shape is not None
    rng = np.random.default_rng(0)
    some = rng.standard_normal((8, shape.rows, shape.dim)) * np.exp(rng.uniform(-2, 2, (8, shape.rows, 1)))
    blocks = np.ascontiguousarray(int8._narrow(some.astype(np.float32).reshape(-1), shape.dtype)).view(np.uint8)
    pool.view[:] = blocks.reshape(8, -1)[np.arange(pool.num_blocks) % 8]


# --- speed -----------------------------------------------------------------------------------------------------------


def speed(num_rounds: int) -> list[list[str]]:
    """One row for each dtype."""
    found = []
    for dtype in DTYPES:
        shape = rows_of(layout(dtype))
        assert shape is not None
        pool = Pool(layout(dtype), (128 << 20) // layout(dtype).block_bytes)
        back = Pool(layout(dtype), pool.num_blocks)
        fill(pool)
        encoded = np.zeros((pool.num_blocks, shape.encoded_bytes), np.uint8)
        ids = np.arange(pool.num_blocks, dtype=np.int32)
        rates: dict[str, list[float]] = {"encode": [], "decode": []}
        for _ in range(num_rounds + 1):
            for name in rates:
                began = process_time()
                if name == "encode":
                    int8.encode(pool.view, ids, shape, encoded)
                else:
                    int8.decode(encoded, back.view, ids, shape)
                rates[name].append(pool.view.size / 1e9 / (process_time() - began))
        old, new = (int8._widen(each.view[:8].reshape(-1), dtype) for each in (pool, back))
        error = math.sqrt(float(((old - new) ** 2).mean() / (old**2).mean()))
        shown = [rounds.spread(values[1:]) for values in rates.values()]
        ratio = shape.block_bytes / shape.encoded_bytes
        found.append([dtype, *(each.show() for each in shown if each), f"{ratio:.2f}", f"{error:.2%}"])
        pool.close()
        back.close()
    return found


# --- quality ---------------------------------------------------------------------------------------------------------


def perplexity(num_texts: int) -> dict[str, float]:
    """Of second halves of texts, by how the KV of their first halves came."""
    import torch

    from diptych import LLM
    from diptych.config import DEMO
    from diptych.engine.adapter import load
    from diptych.engine.executor import Sampling
    from diptych.engine.layouts import kv_layout
    from diptych.engine.torch_executor import TorchExecutor
    from diptych.modelfacts import read_facts
    from diptych.policy.messages import Run, Slice

    torch.set_num_threads(1)
    with LLM("demo", mixed=1, kv_memory="16MiB") as llm:
        texts = [
            llm.text.encode(" ".join(story(random.Random(9_000_000 + 20 * i + k)) for k in range(20)))
            for i in range(num_texts)
        ]
    half = 256
    kv, model = kv_layout(read_facts(str(DEMO)), "float32", 16), load(str(DEMO), "float32")
    here, there = (TorchExecutor(model, Pool(kv, 64), num_threads=1) for _ in range(2))
    shape = rows_of(kv)
    assert shape is not None
    ids = np.arange(half // 16, dtype=np.int32)
    encoded = np.zeros((len(ids), shape.encoded_bytes), np.uint8)
    losses: dict[str, list[float]] = {"raw": [], "int8": []}
    for number, text in enumerate(texts):
        tokens = text[: 2 * half]
        assert len(tokens) == 2 * half, "texts are too short"
        here.admit(number, tokens, len(tokens), Sampling())
        here.collect(here.launch(Run(2 * number, (Slice(number, 0, half, tuple(range(half // 16)), admit=True),))))
        for name, found in losses.items():
            if name == "int8":
                int8.encode(here.pool.view, ids, shape, encoded)
                int8.decode(encoded, there.pool.view, ids, shape)
            else:
                there.pool.view[ids] = here.pool.view[ids]
            rid = 2 * number + (name == "int8")
            there.admit(rid, tokens, len(tokens), Sampling(prompt_logprobs=0))
            piece = Slice(rid, half, half, tuple(range(half // 8)), sample=True, admit=True)
            result = there.collect(there.launch(Run(rid, (piece,))))
            _, scores = result.prompt_scores[rid]
            found += [-float(np.frombuffer(score.values, np.float32)[0]) for score in scores]
            there.forget(rid)
        here.forget(number)
    return {name: math.exp(statistics.fmean(found)) for name, found in losses.items()}


def recall(codec: str, num_questions: int) -> tuple[int, dict[str, int]]:
    """Right answers through a live pair over TCP, and how many reads travelled how."""
    import httpx

    from diptych.config import load_cluster
    from diptych.serve.supervisor import Supervisor

    def ask(seed: int) -> bool:
        rng = random.Random(1_000_000 + seed)
        notes, pairs = make_notes(rng, min_tokens=520)
        asked, answer = rng.choice(pairs)
        body = {"messages": [{"role": "user", "content": f"{notes} {asked}"}], "temperature": 0, "max_tokens": 24}
        reply = httpx.post(f"{url}/v1/chat/completions", json={"model": "diptych-demo", **body}, timeout=60).json()
        return bool(reply["choices"][0]["message"]["content"] == answer)

    flags = {"prefill": 1, "decode": 1, "port": 0, "transport": "tcp", "codec": codec, "log_level": "error"}
    with Supervisor(load_cluster(None, flags)) as supervisor, ThreadPoolExecutor(4) as threads:
        supervisor.wait_ready(60.0)
        url = supervisor.url
        right = sum(threads.map(ask, range(num_questions)))
        rows = httpx.get(f"{url}/workers").json()["workers"]
    return right, next(row["kv"]["codecs"] for row in rows if row["role"] == "decode")


# --- links -----------------------------------------------------------------------------------------------------------


async def serve(dtype: str, num_blocks: int) -> None:
    """The source process: says what it offers, then lives until its input ends."""
    transport, pool = TcpTransport("source", 1, "benchmark", "127.0.0.1:0"), Pool(layout(dtype), num_blocks)
    fill(pool)
    transport.register(pool)
    print(transport.describe().hex(), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await transport.close()


async def over_link(
    described: bytes, pool: Pool, rate: float, num_rounds: int
) -> tuple[dict[str, list[float]], Chooser]:
    """Seconds of each read over one link, by what was wished; and what was learned of the codec on the way."""
    reader = TcpTransport("reader", 1, "benchmark")
    transport = EmulatedTransport(reader, lambda _: rate)
    transport.register(pool)
    peers = {name: await transport.connect(described) for name in WAYS}
    choosers = {name: peer._prepare.__self__.chooser for name, peer in peers.items()}  # type: ignore[attr-defined]
    ids = np.arange(pool.num_blocks, dtype=np.int32)
    for name, wish in WAYS.items():
        for _ in range(6):  # the rule learns
            await peers[name].read(Plan(ids, ids, codec=wish), 60).done()
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    names = tuple(WAYS)
    for turn in range(len(names) * num_rounds):
        name = names[(turn + turn // len(names)) % len(names)]  # in turns, and everyone at each place as often
        began = perf_counter()
        await peers[name].read(Plan(ids, ids, codec=WAYS[name]), 60).done()
        times[name].append(perf_counter() - began)
    await transport.close()
    return times, choosers["int8"]


def even(num_bytes: int, found: Sequence[tuple[float, float]]) -> float | None:
    """The rate of raw reads at which int8 gains nothing; found: (seconds of a raw read, gain), slowest link first.

    None where int8 gains on every link: the loopback interface is slower than the break-even.
    """
    for (raw_s, gain), (next_s, loss) in zip(found, found[1:], strict=False):
        if gain > 0 >= loss:
            return num_bytes / (next_s + (raw_s - next_s) * -loss / (gain - loss))
    return None


def links(dtype: str, num_bytes: int, num_rounds: int) -> dict[str, Any]:
    """Links around the break-even, with blocks of one dtype."""
    num_blocks = num_bytes // layout(dtype).block_bytes
    pool, command = Pool(layout(dtype), num_blocks), [sys.executable, __file__, "--serve", dtype, str(num_blocks)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdin is not None
        described = bytes.fromhex(process.stdout.readline())
        _, chooser = asyncio.run(over_link(described, pool, 1e9, num_rounds))
        guess = chooser.break_even_bytes_per_s
        sweep = []
        for factor in (0.25, 0.5, 0.71, 1.0, 1.41, 2.0):
            times, chooser = asyncio.run(over_link(described, pool, factor * guess, num_rounds))
            low = {name: statistics.median(found) for name, found in times.items()}
            to_raw = {name: statistics.median(map(truediv, found, times["raw"])) for name, found in times.items()}
            sweep.append(
                {
                    "bytes_per_s": factor * guess,
                    "raw_s": low["raw"],
                    "int8_s": low["int8"],
                    "auto_s": low["auto"],
                    "gain_s": low["raw"] - low["int8"],
                    "auto_to_raw": to_raw["auto"],
                    "raw_to_raw": to_raw["raw again"],
                    "predicted": chooser.break_even_bytes_per_s,
                }
            )
        process.stdin.close()
    pool.close()
    predicted = statistics.median(each["predicted"] for each in sweep)
    measured = even(num_bytes, [(each["raw_s"], each["gain_s"]) for each in sweep])
    return {"dtype": dtype, "predicted": predicted, "measured": measured, "sweep": sweep}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description="int8 on the wire.")
    parser.add_argument("--parts", default="speed,quality,links")
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--mb", type=int, default=4, help="KV of one read over links; up to 8 it is one request")
    parser.add_argument("--dtypes", default="float16,bfloat16,float32", help="for links")
    parser.add_argument("--questions", type=int, default=60)
    parser.add_argument("--texts", type=int, default=40)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.serve:
        asyncio.run(serve(arguments.serve[0], int(arguments.serve[1])))
        return 0
    about = rounds.environment()
    print(f"commit {about['commit']}, {about['when']}, {about['cpu']}, load {about['load_average']}")
    said: dict[str, Any] = {"about": about, "arguments": {k: str(v) for k, v in vars(arguments).items()}}
    if "speed" in arguments.parts:
        said["speed"] = speed(arguments.rounds)
        header = ["KV", "encode, GB/CPU s", "decode, GB/CPU s", "ratio", "error, rms"]
        rounds.print_table(header, said["speed"], "The codec", arguments.markdown)
    if "quality" in arguments.parts:
        said["perplexity"] = found = perplexity(arguments.texts)
        said["recall"] = answers = {codec: recall(codec, arguments.questions) for codec in ("raw", "int8")}
        rows = [
            [codec, f"{found[codec]:.5f}", f"{answers[codec][0]} of {arguments.questions}", str(answers[codec][1])]
            for codec in ("raw", "int8")
        ]
        rounds.print_table(["wire", "perplexity", "recall", "reads"], rows, "The bundled model", arguments.markdown)
    if "links" in arguments.parts:
        said["links"] = []
        for dtype in arguments.dtypes.split(","):
            said["links"].append(each := links(dtype, arguments.mb << 20, arguments.rounds))
            _show_links(each, arguments.markdown)
    if arguments.out:
        rounds.write_json(arguments.out, said)
    return 0


def _show_links(found: dict[str, Any], markdown: bool) -> None:
    rows = [
        [f"{each['bytes_per_s'] / 1e9:.3f}", *(f"{each[key] * 1e3:.3f}" for key in ("raw_s", "int8_s", "auto_s"))]
        + [f"{each['auto_to_raw']:.3f}", f"{each['raw_to_raw']:.3f}"]
        for each in found["sweep"]
    ]
    measured = found["measured"]
    said = f"{measured / 1e9:.2f} GB/s ({measured / found['predicted']:.2f})" if measured else "above all of these"
    title = f"{found['dtype']}: break-even predicted {found['predicted'] / 1e9:.2f} GB/s, measured {said}"
    header = ["emulated, GB/s", "raw, ms", "int8, ms", "auto, ms", "auto / raw", "raw / raw"]
    print(title)
    rounds.print_table(header, rows, "", markdown)


if __name__ == "__main__":
    sys.exit(main())
