"""From the hidden states of a prompt to one vector: the last token's, or the mean over all of them.

Not responsible for computing hidden states (`adapter.py`), nor for what is made of a vector (`serve/pooling.py`).
"""

import torch
from torch import Tensor

from diptych.engine.sequence import Piece


def pool(piece: Piece, states: Tensor) -> Tensor | None:
    """Take in a slice's hidden states [count, hidden]; at the end of its prompt, the pooled one [hidden].

    A mean is summed in float32 from chunk to chunk, so it needs every token of the prompt computed, none found.
    """
    sequence = piece.sequence
    if sequence.sampling.pooling != "mean":
        return states[-1] if piece.sample else None
    fresh = states.sum(0, dtype=torch.float32)
    if piece.start > 0 and sequence.pooled is None:
        raise RuntimeError(f"sequence {piece.rid}: a mean is wanted, and its first {piece.start} tokens were found")
    sequence.pooled = fresh if piece.start == 0 else sequence.pooled + fresh
    return sequence.pooled / piece.end if piece.sample else None
