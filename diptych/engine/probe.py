"""Before a model serves anyone: a few tokens through our attention, compared with the model's own.

Catches a class that ignores our attention (calls are counted), that masks, positions or scales otherwise, or whose
heads lie otherwise. Costs six forwards of at most some twenty tokens. Not responsible for what only long
contexts would show (windows, scaled rotary tables): `adapter.py` reads those from the configuration.
"""

import numpy as np
import torch
from torch import Tensor

from diptych.engine.adapter import Model
from diptych.engine.attention import PagedKV, lay_out
from diptych.engine.executor import Sampling
from diptych.engine.sequence import Piece, Sequence
from diptych.errors import UnsupportedModel

NUM_TOKENS = 19
BLOCK_SIZE = 4
# Root mean square of the difference over that of the reference. Wrong masks or positions give about 1; bfloat16
# carries 8 bits, and each layer adds its own rounding.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.05}


def check(model: Model) -> None:
    """Raise UnsupportedModel unless a sequence gives the model's own logits, in one piece and in several.

    The pieces are such that every way of attending is taken: a few new tokens without a past and with one, more of
    them likewise, and a single one (`attention.lay_out`).
    """
    facts = model.facts
    # Any ids do; spread over the vocabulary, and all different unless it is tiny.
    ids = [(7 + 37 * i) % facts.vocab for i in range(NUM_TOKENS)]
    try:
        reference = model.reference_logits(ids)
        for cuts in ([0, NUM_TOKENS], [0, 5, 15, NUM_TOKENS - 1, NUM_TOKENS]):
            _compare(model, _paged_logits(model, ids, cuts), reference)
    except (RuntimeError, TypeError, AttributeError, IndexError) as error:
        raise UnsupportedModel(f"{facts.folder} fails with our attention: {error}") from error


def _paged_logits(model: Model, ids: list[int], cuts: list[int]) -> Tensor:
    """Logits [tokens, vocab] of a sequence computed in pieces, over a scattered block table in a scratch pool."""
    facts = model.facts
    num_blocks = -(-len(ids) // BLOCK_SIZE)
    shape = (num_blocks, facts.num_layers, 2, facts.num_kv_heads, BLOCK_SIZE, facts.head_dim)
    kv = PagedKV(torch.full(shape, 3.0, dtype=model.dtype, device=model.device))
    table = np.arange(num_blocks, dtype=np.int32)[::-1].copy()
    sequence = Sequence(ids, len(ids), Sampling())
    logits = []
    for start, end in zip(cuts, cuts[1:], strict=False):
        piece = Piece(0, sequence, start, end - start, table[: -(-end // BLOCK_SIZE)], True)
        batch = lay_out([piece], kv)
        logits.append(model.logits(batch, list(range(piece.count))))
        if batch.num_calls != facts.num_layers:
            raise UnsupportedModel(
                f"{facts.folder}: our attention was called {batch.num_calls} times in a forward of "
                f"{facts.num_layers} layers, so some layers attend in a way of their own"
            )
    return torch.cat(logits)


def _compare(model: Model, ours: Tensor, reference: Tensor) -> None:
    difference = ours.float() - reference.float()
    error = float(difference.pow(2).mean().sqrt() / reference.float().pow(2).mean().sqrt().clamp_min(1e-12))
    if not error <= TOLERANCE[model.dtype]:  # written so that NaN is refused
        raise UnsupportedModel(
            f"{model.facts.folder}: logits with our attention differ from the model's own by {error:.3g} "
            f"(relative; {TOLERANCE[model.dtype]} is allowed)"
        )
