"""Before a model serves anyone: a few tokens through our attention, compared with the model's own.

Catches a class that ignores our attention (calls are counted), that masks, positions or scales otherwise, or whose
heads lie otherwise. What would show in long contexts only (windows, capped scores) is made to show: for the
duration of the probe the model's own numbers for them are small. Costs six forwards of at most some twenty tokens,
twice as many for a model that has such numbers. Not responsible for what a configuration says (`families.py`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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
# What models call such numbers, and a value that some twenty tokens feel.
SHARP = {"sliding_window": 5, "attn_logit_softcapping": 0.5}
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
    ids = [(7 + 37 * i) % facts.vocab for i in range(min(NUM_TOKENS, facts.max_positions))]
    try:
        _check_once(model, ids)
        with _sharpened(model.module) as changed:
            if changed:
                _check_once(model, ids)
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{facts.folder} ({facts.model_type}) is not supported: {error}") from None
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UnsupportedModel(f"{facts.folder} fails with our attention: {error}") from error


def _check_once(model: Model, ids: list[int]) -> None:
    reference = model.reference_logits(ids)
    for cuts in ([0, len(ids)], [0, 5, 15, len(ids) - 1, len(ids)]):
        _compare(model, _paged_logits(model, ids, cuts), reference)


@contextmanager
def _sharpened(module: Any) -> Iterator[bool]:
    """Make windows and the like so small that twenty tokens show them; yields whether there were any."""
    owners = {id(owner): owner for owner in _owners(module)}.values()
    found = [(o, name, getattr(o, name, None)) for o in owners for name in SHARP]
    found = [(owner, name, value) for owner, name, value in found if _is_number(value)]
    try:
        for owner, name, _ in found:
            setattr(owner, name, SHARP[name])
        yield bool(found)
    finally:
        for owner, name, value in found:
            setattr(owner, name, value)


def _owners(module: Any) -> Iterator[Any]:
    """Everything a model's code may read such a number from: its modules and their configurations."""
    for part in module.modules():
        yield part
        if hasattr(part, "config"):
            yield part.config


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


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
        batch.fusable = False  # what is compared is the library's code with our attention
        logits.append(model.logits(batch, list(range(piece.count))))
        if batch.num_calls != facts.num_layers:
            raise UnsupportedModel(
                f"our attention was called {batch.num_calls} times in a forward of "
                f"{facts.num_layers} layers, so some layers attend in a way of their own"
            )
    return torch.cat(logits)


def _compare(model: Model, ours: Tensor, reference: Tensor) -> None:
    difference = ours.float() - reference.float()
    error = float(difference.pow(2).mean().sqrt() / reference.float().pow(2).mean().sqrt().clamp_min(1e-12))
    if not error <= TOLERANCE[model.dtype]:  # written so that NaN is refused
        raise UnsupportedModel(
            f"logits with our attention differ from the model's own by {error:.3g} "
            f"(relative; {TOLERANCE[model.dtype]} is allowed)"
        )
