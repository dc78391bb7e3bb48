"""A 128k-token prompt goes through both pools once, and what policy and the wire spend on a step does not notice."""

import random
from pathlib import Path

import torch
from checkpoints import make_checkpoint

from diptych.config import load_cluster
from diptych.engine.executor import Sampling
from diptych.engine.paced import PacedModel, oracle
from diptych.journal import POLICY, read_journals
from diptych.policy.messages import Place, Publish, Pull
from diptych.serve.build import build
from diptych.serve.local import LocalCluster
from diptych.sim.replay import replay

NUM_TOKENS = 128 * 1024


def test_128k_tokens_through_a_real_model(tmp_path: Path) -> None:
    """One layer, one KV head: the attention is still quadratic, the rest is as small as it gets."""
    torch.set_num_threads(2)
    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 1, "num_key_value_heads": 1}
    folder = make_checkpoint(
        "llama", tmp_path / "model", **sizes, intermediate_size=32, max_position_embeddings=2 * NUM_TOKENS
    )
    settings = {"model": str(folder), "prefill": 1, "decode": 1, "chunk": 8192, "kv_memory": "20MiB", "cores": [0, 1]}
    config = load_cluster(None, settings)
    cluster = LocalCluster([build(config, worker) for worker in config.workers], journal=tmp_path / "journal")
    rng = random.Random(1)
    answer = cluster.submit([rng.randrange(3, 300) for _ in range(NUM_TOKENS)], 4, Sampling())
    cluster.run_until([answer])
    cluster.settle()
    assert len(answer.tokens) == 4 and cluster.workers["d0"].traffic.num_bytes >= NUM_TOKENS * 2 * 16 * 4
    cluster.close()
    for recording in read_journals(tmp_path / "journal"):
        assert replay(recording).difference is None


def test_messages_stay_small_however_long_the_context(tmp_path: Path) -> None:
    """All but the one message that brings the prompt are bounded by the chunk, not by the context."""
    model = PacedModel(vocab=300)
    sizes = {}
    for num_tokens in (1024, 16 * 1024):
        flags = {"engine": "paced", "kv_memory": "4MiB", "prefill": 1, "decode": 1, "chunk": 256}
        config = load_cluster(
            None, flags | {"paced": {"base_ms": 0, "new_token_us": 0, "context_token_us": 0, "vocab": 300}}
        )
        journal = tmp_path / str(num_tokens)
        cluster = LocalCluster([build(config, worker) for worker in config.workers], journal=journal)
        prompt = [i % 300 for i in range(num_tokens)]
        answer = cluster.submit(prompt, 8, Sampling())
        cluster.run_until([answer])
        cluster.settle()
        cluster.close()
        assert answer.tokens == oracle(prompt, 8, model)
        sizes[num_tokens] = largest(journal)
    assert sizes[1024].keys() == sizes[16 * 1024].keys()
    for kind, size in sizes[16 * 1024].items():
        # Sixteen times the context; a block id may take three bytes where it took one.
        assert size <= 3 * sizes[1024][kind], f"{kind}: {sizes[1024][kind]} bytes, then {size}"


def largest(journal: Path) -> dict[str, int]:
    """Bytes of the largest order of each kind; Place brings the prompt, and the first Run after it its blocks."""
    found: dict[str, int] = {}
    for recording in read_journals(journal):
        for _, _, orders in recording:
            for order in orders:
                admits = any(piece.admit for piece in getattr(order, "slices", ()))
                if not isinstance(order, Place) and not admits:
                    kind = type(order).__name__
                    found[kind] = max(found.get(kind, 0), len(POLICY.encode(order)))
    assert {Publish.__name__, Pull.__name__, "Run", "Emit"} <= found.keys()
    return found
