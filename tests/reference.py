"""What a checkpoint's own `generate()` says, and the one way in which we may differ from it: a tie."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from lanes import Lanes

from diptych.config import load_cluster
from diptych.engine.executor import Sampling
from diptych.serve.build import build
from diptych.serve.local import LocalCluster
from diptych.transfer.copying import read_now
from diptych.transfer.pool import Pool
from diptych.transfer.seam import Lane, Plan, Readable, Stats

TIE = 1e-4  # logits of the two best tokens closer than this are a tie


@dataclass(frozen=True)
class Expected:
    """Greedy tokens, and at each of them the distance between the two best logits."""

    tokens: list[int]
    gaps: list[float]


class Reference:
    """transformers' own greedy decoding of one checkpoint in fp32."""

    def __init__(self, folder: Path):
        config = json.loads((folder / "config.json").read_text())
        (name,) = config["architectures"]
        # Below transformers 5.23 Gemma 2 would take SDPA, which leaves its soft cap out.
        how = {"attn_implementation": "eager"} if config.get("attn_logit_softcapping") else {}
        self._model = getattr(transformers, name).from_pretrained(folder, dtype=torch.float32, **how).eval()
        self.num_ties = 0

    @torch.inference_mode()
    def greedy(self, prompt: list[int], num_new: int, ignore_eos: bool = True, **how: float) -> Expected:
        """`num_new` tokens after `prompt` (fewer where an end of sequence counts). `how` goes to `generate()`."""
        out = self._model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=num_new,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
            **({"eos_token_id": None} if ignore_eos else {}),
            **how,
        )
        best = [logits[0].float().topk(2).values for logits in out.scores]
        return Expected(out.sequences[0, len(prompt) :].tolist(), [float(b[0] - b[1]) for b in best])

    @torch.inference_mode()
    def logprobs(self, tokens: list[int]) -> torch.Tensor:
        """[tokens, vocab]: at each place, what may come next."""
        return self._model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)

    def check(self, expected: Expected, tokens: list[int], what: str) -> None:
        """Raise AssertionError unless the tokens are the same up to a tie; ties are counted."""
        for i, (theirs, ours) in enumerate(zip(expected.tokens, tokens, strict=False)):
            if theirs != ours:
                assert expected.gaps[i] < TIE, f"{what}: token {i} is {ours}, generate() says {theirs} ({tokens})"
                self.num_ties += 1
                return
        assert len(tokens) == len(expected.tokens), f"{what}: {len(tokens)} tokens, generate() has {expected.tokens}"


def answers(
    folder: Path, prompts: list[list[int]], num_new: int, lane: Lane = "local", **flags: Any
) -> list[list[int]]:
    """What a cluster in this process answers to all prompts at once; afterwards every block of it is home.

    lane: how KV crosses from pool to pool.
    """
    if lane != "local":
        with Lanes(lane) as lanes:
            found = _answers(folder, prompts, num_new, lanes.read, **flags)
            assert lanes.num_bytes > 0
            return found
    return _answers(folder, prompts, num_new, read_now, **flags)


def _answers(
    folder: Path,
    prompts: list[list[int]],
    num_new: int,
    read: Callable[[Pool, Pool, Plan, Readable], Stats],
    **flags: Any,
) -> list[list[int]]:
    config = load_cluster(None, {"model": str(folder), "kv_memory": "4MiB", "cores": [0], **flags})
    cluster = LocalCluster([build(config, worker) for worker in config.workers], read=read)
    try:
        given = [cluster.submit(prompt, num_new, Sampling()) for prompt in prompts]
        cluster.run_until(given)
        cluster.settle()
        for driver in cluster.workers.values():
            driver.policy.pool.check()
            assert not driver.policy.seqs
        assert not any(answer.error for answer in given)
        return [answer.tokens for answer in given]
    finally:
        cluster.close()
