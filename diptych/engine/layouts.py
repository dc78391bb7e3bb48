"""The pool layout of a real model's KV, from its facts alone: no torch, so anyone may size a pool.

Not responsible for how many blocks there are, nor for the paced model's layout (`paced.py`).
"""

from diptych.modelfacts import ModelFacts, dtype_bytes
from diptych.transfer.layout import Layout


def kv_layout(facts: ModelFacts, dtype: str | None = None, block_size: int = 32) -> Layout:
    """Blocks [layer, K/V, head, token, dim] of `dtype` (default: the weights'); ConfigError for an unknown dtype."""
    dtype = dtype or facts.dtype
    dtype_bytes(dtype)
    return Layout.uniform(
        layers=facts.num_layers,
        kv_heads=facts.num_kv_heads,
        head_dim=facts.head_dim,
        block_size=block_size,
        dtype=dtype,
        model=facts.fingerprint,
    )
