"""What fewer bits cost the bundled model: perplexity, greedy agreement, and the size of its weights.

    python benchmarks/precision.py [--turns 200] [--out FILE] [--markdown]

Turns of the kind that the model was trained on, drawn anew (`diptych/demo/chat.py`). Perplexity is that of the replies;
agreement, how often the likeliest next token is the one that float32 finds likeliest, over the same tokens. All through
the engine, so with its kernels. Not responsible for speed (`engine.py`, with `--quantize`).
"""

import argparse
import math
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diptych.bench import rounds
from diptych.config import DEMO
from diptych.demo import chat
from diptych.engine import adapter
from diptych.engine.attention import PagedKV, lay_out
from diptych.engine.executor import Sampling
from diptych.engine.sequence import Piece, Sequence

WAYS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "float32, int8 weights": {"dtype": "float32", "quantize": "int8"},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16, int8 weights": {"dtype": "bfloat16", "quantize": "int8"},
}
BLOCK = 16


def main() -> int:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description="Perplexity and agreement of the bundled model, by precision.")
    parser.add_argument("--turns", type=int, default=200)
    parser.add_argument("--out", type=Path, help="JSON of everything measured")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    arguments = parser.parse_args()
    turns = _turns(arguments.turns)
    found = {name: _measure(adapter.load(DEMO, **how), turns) for name, how in WAYS.items()}
    truth = found["float32"]["choices"]
    rows = []
    for name, each in found.items():
        agreement = float(np.mean(each["choices"] == truth))
        rows.append([name, f"{each['megabytes']:.1f}", f"{each['perplexity']:.4f}", f"{agreement:.2%}"])
    title = f"{arguments.turns} turns, {len(truth)} tokens of replies"
    rounds.print_table(["", "weights, MB", "perplexity", "agrees with float32"], rows, title, arguments.markdown)
    if arguments.out:
        rounds.write_json(arguments.out, {"about": rounds.environment(), "title": title, "rows": rows})
    return 0


def _turns(num: int) -> list[tuple[list[int], int]]:
    """(token ids of a turn, how many of them are its prompt)."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(DEMO)
    draw, turns = random.Random(2026), []
    for _ in range(num):
        asked, reply = chat.draw_turn(draw)
        message = [{"role": "user", "content": asked}]
        prompt = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        ids = tokenizer.encode(prompt, add_special_tokens=False)
        end = [tokenizer.eos_token_id]
        turns.append((ids + tokenizer.encode(reply, add_special_tokens=False) + end, len(ids)))
    return turns


def _measure(model: adapter.Model, turns: list[tuple[list[int], int]]) -> dict[str, Any]:
    loss, choices = 0.0, []
    for ids, num_prompt in turns:
        logits = _logits(model, ids)[num_prompt - 1 : -1].float()
        wanted = torch.tensor(ids[num_prompt:])
        loss += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
        choices.append(logits.argmax(1).numpy())
    together = np.concatenate(choices)
    parts = [*model.module.parameters(), *model.module.buffers()]
    size = sum(part.numel() * part.dtype.itemsize for part in {id(p): p for p in parts}.values())
    return {"perplexity": math.exp(loss / len(together)), "choices": together, "megabytes": size / 1e6}


def _logits(model: adapter.Model, ids: list[int]) -> torch.Tensor:
    """[tokens, vocab]"""
    facts = model.facts
    num_blocks = -(-len(ids) // BLOCK)
    shape = (num_blocks, facts.num_layers, 2, facts.num_kv_heads, BLOCK, facts.head_dim)
    table = np.arange(num_blocks, dtype=np.int32)
    piece = Piece(0, Sequence(ids, len(ids), Sampling()), 0, len(ids), table, True)
    batch = lay_out([piece], PagedKV(torch.zeros(shape, dtype=model.dtype)))
    return model.logits(batch, list(range(len(ids))))


if __name__ == "__main__":
    sys.exit(main())
