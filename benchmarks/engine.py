"""The engine against `generate()` and against what the machine can do: decoding, prompts, and a step's budget.

    python benchmarks/engine.py [--models 500M,30M] [--cores 1,2] [--rounds 5] [--only decode,prefill] [--out FILE]

Models are random Llamas, made once in `--folder`. The engine is driven at its seam, `launch` and `collect` with `Run`
steps in the order in which the policy would give them, in this process: no HTTP, no policy, no transfer. `generate()`
gets the same weights, dtype, threads and lengths, as one static batch. Both decode over contexts that are already
there (random keys and values), so that no round computes prompts twice. A number of cores is a process, pinned to them.

A round is everything once, in turns; figures are medians over the rounds, with least and most, ratios round by round.
The roof is measured in the same rounds: reading memory, and the rate of a large product. Not responsible for serving
(`diptych bench`, `modes.py`), nor for the attention kernel by itself (`attention.py`).
"""

import argparse
import json
import os
import random
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported

import numpy as np
import torch

from diptych.bench import rounds
from diptych.engine import adapter, attention, kernels
from diptych.engine.executor import Sampling
from diptych.engine.features import Features
from diptych.engine.layouts import kv_layout
from diptych.engine.torch_executor import TorchExecutor
from diptych.policy.messages import Run, Slice
from diptych.transfer.pool import Pool

MODELS = {
    "500M": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 4,
             "intermediate_size": 4096, "vocab_size": 32000},
    "30M": {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 2,
            "intermediate_size": 1536, "vocab_size": 4096},
}  # fmt: skip
DECODES = [(1, 256), (8, 256), (32, 256), (8, 1024)]  # (sequences, tokens of context)
PREFILLS = [(1, 2048), (8, 512)]
CHUNK, BLOCK = 512, 32
clock = perf_counter


def main() -> int:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description="The engine against generate() and against the machine.")
    parser.add_argument("--models", default="500M,30M", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--cores", default="1,2", help="how many of them; one table for each")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="decode,prefill", help="what is measured")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument(
        "--quantize", default=None, choices=["int8"], help="the engine's weights; generate() keeps them"
    )
    parser.add_argument("--level", default="", choices=["", "off", *kernels.LEVELS], help="of the kernels")
    parser.add_argument("--steps", type=int, default=12, help="tokens of an answer that is timed")
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"], help="cpu: one core's, on a busy machine")
    parser.add_argument("--folder", type=Path, default=Path.home() / ".cache/diptych/benchmarks")
    parser.add_argument("--out", type=Path, help="JSON of everything measured")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(_Bench(arguments).measure()))
        return 0
    about = rounds.environment()
    print(f"commit {about['commit']}, {about['when']}, {about['cpu']}, torch {about['torch']}; {arguments.dtype}")
    results = []
    for model in arguments.models.split(","):
        _make(model, arguments.folder)
        for cores in arguments.cores.split(","):
            found = _child(model, cores)
            results.append({"model": model, "cores": int(cores), **found})
            _show(results[-1], arguments.markdown)
    if arguments.out:
        rounds.write_json(arguments.out, {"about": about, "command": sys.argv[1:], "results": results})
    return 0


def _child(model: str, cores: str) -> dict[str, Any]:
    command = [sys.executable, __file__, *sys.argv[1:], "--models", model, "--cores", cores, "--child"]
    environment = {**os.environ, "OMP_NUM_THREADS": cores}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _make(name: str, folder: Path) -> None:
    """A checkpoint of random weights, unless it is there."""
    if (folder / name / "config.json").exists():
        return
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**MODELS[name], head_dim=64, max_position_embeddings=4096, tie_word_embeddings=False)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / name)


class _Bench:
    """Both ways of running one model, on so many cores."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        global clock
        clock = thread_time if arguments.clock == "cpu" else perf_counter
        warnings.simplefilter("ignore")  # transformers has its say about padding
        self.arguments = arguments
        kernels.WANTED = arguments.level
        self.threads = int(arguments.cores)
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: self.threads])
        torch.set_num_threads(self.threads)
        folder = arguments.folder / arguments.models
        extra = {"quantize": arguments.quantize} if arguments.quantize else {}
        self.model = adapter.load(folder, arguments.dtype, **extra)
        self.theirs = _Generate(folder, arguments.dtype)
        self.random = random.Random(0)
        self.buffer = torch.ones(64 << 20)
        self.square = torch.randn(1024, 1024).to(self.model.dtype)

    def measure(self) -> dict[str, Any]:
        """Everything, in turns."""
        ways: dict[str, Callable[[], float]] = {"read": self._read, "product": self._product}
        only = self.arguments.only.split(",")
        for shape in DECODES if "decode" in only else []:
            ways[f"generate decode {shape}"] = lambda s=shape: self.theirs.decode(*s, self.arguments.steps)
            ways[f"ours decode {shape}"] = lambda s=shape: self._decode(*s)
        for shape in PREFILLS if "prefill" in only else []:
            ways[f"generate prefill {shape}"] = lambda s=shape: self.theirs.prefill(*s)
            ways[f"ours prefill {shape}"] = lambda s=shape: self._prefill(*s)
        found: dict[str, list[float]] = {name: [] for name in ways}
        for name, way in ways.items():
            if "prefill" not in name:  # those are long enough to be their own warm-up
                way()
        for _, name in rounds.interleaved(list(ways), self.arguments.rounds):
            with torch.inference_mode():
                found[name].append(ways[name]())
        budgets = {str(shape): self._budget(*shape) for shape in DECODES} if "decode" in only else {}
        return {"rates": found, "budgets": budgets, "bytes": self._bytes()}

    def _read(self) -> float:
        """GB/s; the best of some, since whatever disturbs it only makes it less."""
        return self.buffer.numel() * 4 / _least(lambda: self.buffer.sum(), 5) / 1e9

    def _product(self) -> float:
        """GFLOP/s."""
        return 2 * 1024**3 / _least(lambda: self.square @ self.square, 10) / 1e9

    def _executor(self, num_sequences: int, length: int) -> tuple[TorchExecutor, int]:
        facts = self.model.facts
        each = -(-length // BLOCK)
        pool = Pool(kv_layout(facts, self.arguments.dtype, BLOCK), num_sequences * each)
        executor = TorchExecutor(self.model, pool, self.threads)
        executor._kv.pages.normal_()
        for rid in range(num_sequences):
            executor.admit(rid, self.random.choices(range(facts.vocab), k=length), length, Sampling())
        return executor, each

    def _decode(self, num: int, context: int) -> float:
        """Tokens a second, after `context` tokens whose KV is there."""
        steps = self.arguments.steps
        executor, each = self._executor(num, context + steps + 2)
        for rid in range(num):
            executor.truncate(rid, context)
        order = self.random.sample(range(num * each), num * each)  # blocks lie scattered, as they do in a server

        def step(i: int) -> None:
            slices = []
            for rid in range(num):
                blocks = tuple(order[rid * each : (rid + 1) * each]) if i == 0 else ()
                slices.append(Slice(rid, context - 1 + i, 1, blocks, True, i == 0))
            executor.collect(executor.launch(Run(i, tuple(slices))))

        step(0)
        begin = clock()
        for i in range(1, steps + 1):
            step(i)
        return num * steps / (clock() - begin)

    def _prefill(self, num: int, length: int) -> float:
        """Prompt tokens a second, in chunks, one prompt after the other as they would come."""
        executor, each = self._executor(num, length)
        begin = clock()
        for rid in range(num):
            for start in range(0, length, CHUNK):
                count = min(CHUNK, length - start)
                first = start == 0
                blocks = tuple(range(rid * each, (rid + 1) * each)) if first else ()
                piece = Slice(rid, start, count, blocks, start + count == length, first)
                executor.collect(executor.launch(Run(start, (piece,))))
        return num * length / (clock() - begin)

    def _bytes(self) -> int:
        """Of the weights that a step reads: all but the embedding."""
        embedding = self.model.module.get_input_embeddings().weight
        parts = {id(p): p for p in [*self.model.module.parameters(), *self.model.module.buffers()]}
        return sum(p.numel() * p.dtype.itemsize for p in parts.values() if p is not embedding)

    def _budget(self, num: int, context: int) -> dict[str, float]:
        """Where a decode step's milliseconds go: parts by themselves, the least of several each."""
        module, facts = self.model.module, self.model.facts
        linears = [part for part in module.modules() if hasattr(part, "in_features")]
        inputs = {part.in_features: torch.randn(1, num, part.in_features).to(self.model.dtype) for part in linears}
        shape = (num * -(-context // BLOCK), facts.num_layers, 2, facts.num_kv_heads, BLOCK, facts.head_dim)
        kv = attention.PagedKV(torch.randn(shape).to(self.model.dtype))
        pieces = _pieces(num, context)
        batch = attention.lay_out(pieces, kv)
        heads = facts.num_heads
        query, key, value = (
            torch.randn(num, count, facts.head_dim).to(self.model.dtype).transpose(0, 1)
            for count in (heads, facts.num_kv_heads, facts.num_kv_heads)
        )

        def attend() -> None:
            for layer in range(facts.num_layers):
                batch.attend(layer, query, key, value, Features(facts.head_dim**-0.5))

        def linear() -> None:
            for part in linears:
                part(inputs[part.in_features])

        each = facts.num_layers * 2 * facts.num_kv_heads * facts.head_dim * kv.dtype.itemsize
        with torch.inference_mode():
            return {
                "linears": _least(linear, 5) * 1e3,
                "attention": _least(attend, 5) * 1e3,
                "layout": _least(lambda: attention.lay_out(pieces, kv), 20) * 1e3,
                "kv_bytes": num * context * each,
                "flop": 2 * num * sum(part.in_features * part.out_features for part in linears),
            }


class _Generate:
    """transformers by itself."""

    def __init__(self, folder: Path, dtype: str) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    def decode(self, num: int, context: int, steps: int) -> float:
        """Tokens a second of a static batch, after `context` tokens whose KV is there."""
        from transformers import DynamicCache

        config, cache = self.model.config, DynamicCache()
        shape = (num, config.num_key_value_heads, context, config.head_dim)
        for layer in range(config.num_hidden_layers):
            cache.update(*(torch.randn(shape).to(self.model.dtype) for _ in range(2)), layer)
        times = self._run(torch.randint(0, config.vocab_size, (num, context + 1)), steps + 1, past_key_values=cache)
        return num * steps / (times[-1] - times[0])

    def prefill(self, num: int, length: int) -> float:
        """Prompt tokens a second, all prompts in one batch."""
        ids = torch.randint(0, self.model.config.vocab_size, (num, length))
        begin = clock()
        return num * length / (self._run(ids, 1)[0] - begin)

    def _run(self, ids: torch.Tensor, steps: int, **more: Any) -> list[float]:
        """When each step's logits were there."""
        times: list[float] = []

        def note(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            times.append(clock())
            return scores

        settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "logits_processor": [note]}
        self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=steps, **settings, **more)
        return times


def _pieces(num: int, context: int) -> list[Any]:
    from diptych.engine.sequence import Piece, Sequence

    each = -(-context // BLOCK)
    tables = np.random.default_rng(0).permutation(num * each).astype(np.int32).reshape(num, each)
    sequence = Sequence([0] * context, context, Sampling())
    return [Piece(i, sequence, context - 1, 1, table, True) for i, table in enumerate(tables)]


def _least(work: Callable[[], Any], times: int) -> float:
    work()
    found = []
    for _ in range(times):
        begin = clock()
        work()
        found.append(clock() - begin)
    return min(found)


def _show(result: dict[str, Any], markdown: bool) -> None:
    rates, title = result["rates"], f"{result['model']}, {result['cores']} core(s)"
    read, product = (float(np.median(rates[name])) for name in ("read", "product"))
    rows = [_row(name.removeprefix("ours "), result, read, product) for name in rates if name.startswith("ours ")]
    header = [title, "ours, tok/s", "generate(), tok/s", "ours ÷ generate()", "roof, tok/s", "ours ÷ roof"]
    rounds.print_table(header, rows, f"{title}: reads {read:.1f} GB/s, {product:.0f} GFLOP/s", markdown)
    budget = [_budget_row(shape, parts, result, read, product) for shape, parts in result["budgets"].items()]
    header = [f"a step's ms, {title}", "weights ÷ read", "KV ÷ read", "FLOP ÷ peak", "linears", "attention", "lay-out",
              "the rest", "whole step", "weights, GB/s", "KV, GB/s"]  # fmt: skip
    if budget:
        rounds.print_table(header, budget, "left: at the roof; right: measured, the rest by subtraction", markdown)


def _row(case: str, result: dict[str, Any], read: float, product: float) -> list[str]:
    ours, theirs = result["rates"][f"ours {case}"], result["rates"][f"generate {case}"]
    kind, _, shape = case.partition(" ")
    num, length = (int(text) for text in shape.strip("()").split(","))
    roof = _decode_roof(result, shape, num, read, product) if kind == "decode" else _prefill_roof(result, product)
    spreads = [rounds.spread(ours), rounds.spread(theirs), rounds.ratios(ours, theirs)]
    name = f"decode, {num} at {length}" if kind == "decode" else f"prefill, {num} × {length}"
    return [name, *(s.show() for s in spreads if s), rounds.number(roof), f"{np.median(ours) / roof:.2f}"]


def _decode_roof(result: dict[str, Any], shape: str, num: int, read: float, product: float) -> float:
    """Weights and KV read once, or the arithmetic, whichever takes longer."""
    parts = result["budgets"][shape]
    seconds = max((result["bytes"] + parts["kv_bytes"]) / read / 1e9, parts["flop"] / product / 1e9)
    return num / seconds


def _prefill_roof(result: dict[str, Any], product: float) -> float:
    """The linear layers' arithmetic alone, at the rate of a large product (the head is computed once a prompt)."""
    shape = MODELS[result["model"]]
    kv = shape["num_key_value_heads"] * 64
    each = shape["hidden_size"] * (2 * shape["hidden_size"] + 2 * kv + 3 * shape["intermediate_size"])
    return product * 1e9 / (2 * each * shape["num_hidden_layers"])


def _budget_row(shape: str, parts: dict[str, float], result: dict[str, Any], read: float, product: float) -> list[str]:
    num, context = (int(text) for text in shape.strip("()").split(","))
    whole = num / float(np.max(result["rates"][f"ours decode {shape}"])) * 1e3
    rest = whole - parts["linears"] - parts["attention"] - parts["layout"]
    floor = [result["bytes"] / read / 1e6, parts["kv_bytes"] / read / 1e6, parts["flop"] / product / 1e6]
    measured = [parts["linears"], parts["attention"], parts["layout"], rest, whole]
    rates = [result["bytes"] / parts["linears"] / 1e6, parts["kv_bytes"] / parts["attention"] / 1e6]
    return [f"{num} at {context}", *(rounds.number(value) for value in [*floor, *measured, *rates])]


if __name__ == "__main__":
    sys.exit(main())
