"""Attention written out, for what torch's fused kernel cannot do: capped scores and attention sinks.

Slower than the fused kernel, and never holds more than a tile of scores. Not responsible for masks or for where keys
and values come from (`attention.py`).
"""

import torch
from torch import Tensor

from diptych.engine.features import Features

SCORE_BYTES = 16 << 20  # of float32 scores at a time


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, features: Features) -> Tensor:
    """query [.., KV heads, rows, dim], key and value [.., KV heads, tokens, dim] -> like query.

    The rows are the query heads that share a KV head, each with equally many tokens: head by head. `mask` (0 or
    -inf) broadcasts to [.., KV heads, rows, tokens].
    """
    scores = (query @ key.mT).float() * features.scale
    if features.softcap is not None:
        scores = torch.tanh(scores / features.softcap) * features.softcap
    scores = scores + mask
    if features.sinks is None:
        weights = scores.softmax(-1)
    else:
        kv_heads, rows = scores.shape[-3:-1]
        sinks = features.sinks.float().view(kv_heads, -1)
        sinks = sinks.repeat_interleave(rows // sinks.shape[1], 1).expand(scores.shape[:-1])
        weights = torch.cat([scores, sinks[..., None]], -1).softmax(-1)[..., :-1]
    return weights.to(value.dtype) @ value


def attend_reversed(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, features: Features) -> Tensor:
    """query [KV heads, group, count, dim], last token first; key and value [KV heads, tokens, dim] -> like query.

    `mask` [count, tokens] is `attention.reversed_causal`. Goes tile by tile of queries, and leaves out the keys that
    no query of a tile sees.
    """
    kv_heads, group, count, _ = query.shape
    num_tokens = key.shape[1]
    step = max(1, SCORE_BYTES // (4 * kv_heads * group * num_tokens))
    out = torch.empty_like(query)
    for first in range(0, count, step):
        end = min(first + step, count)
        oldest = max(0, num_tokens - end - features.window + 1) if features.window else 0
        seen = slice(oldest, num_tokens - first)
        rows = query[:, :, first:end].flatten(1, 2)
        tile = attend(rows, key[:, seen], value[:, seen], mask[first:end, seen].repeat(group, 1), features)
        out[:, :, first:end] = tile.view(kv_heads, group, end - first, -1)
    return out
