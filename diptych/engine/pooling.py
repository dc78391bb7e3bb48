"""From the hidden states of a prompt to one vector: the last token's, or the mean over all of them.

Not responsible for computing hidden states (`adapter.py`), nor for what is made of a vector (`serve/pooling.py`).
"""

import torch
from torch import Tensor

from diptych.engine.sequence import Piece


def pool(piece: Piece, states: Tensor) -> Tensor | None:
    """Take in a slice's hidden states [count, hidden]; at the end of its prompt, the pooled one [hidden].

    A mean is summed in float32 from chunk to chunk. What is computed again, after its memory was taken back, was summed
    before; but nothing may be found that another prompt has computed.
    """
    sequence = piece.sequence
    if sequence.sampling.pooling != "mean":
        return states[-1] if piece.sample else None
    begin = sequence.num_pooled - piece.start
    if begin < 0:
        raise RuntimeError(f"sequence {piece.rid}: a mean is wanted, and its first {piece.start} tokens were found")
    if begin < piece.count:
        fresh = states[begin:].sum(0, dtype=torch.float32)
        sequence.pooled = fresh if sequence.pooled is None else sequence.pooled + fresh
        sequence.num_pooled = piece.end
    return sequence.pooled / piece.end if piece.sample else None
