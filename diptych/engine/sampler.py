"""From logits to a token: greedy, temperature, min-p, top-k, top-p.

The token is a function of one row of logits, the parameters, the seed, the position and the tokens before it, and of
nothing else: not of the batch, the step, or how often anyone asked. So a sequence that resumes elsewhere goes on as
it would have. Not responsible for what is done to logits before (`shaping.py`).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from diptych.engine.executor import Sampling

_MASK = (1 << 64) - 1


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) for one draw: counter-based (Salmon et al., "Parallel random numbers", SC 2011).

    The counter is mixed with the seed by splitmix64 (Steele, Lea, Flood, OOPSLA 2014), twice; the top 53 bits count.
    """
    return (_splitmix64(_splitmix64(seed & _MASK) ^ position) >> 11) * 2.0**-53


def _splitmix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK
    return x ^ (x >> 31)


def choose(logits: Tensor, sampling: Sequence[Sampling], positions: Sequence[int]) -> list[int]:
    """The next token of each row. logits [rows, vocab], shaped; positions are those the new tokens will have."""
    tokens: list[int] = logits.argmax(-1).tolist()
    for row, how in enumerate(sampling):
        if how.temperature > 0:
            tokens[row] = _draw(filtered(logits[row], how), uniform(how.seed, positions[row]))
    return tokens


def filtered(row: Tensor, how: Sampling) -> Tensor:
    """Probabilities [vocab], float64, zero where min-p, top-k or top-p exclude a token; not renormalised.

    Min-p (Nguyen et al., "Turning up the heat", ICLR 2025) keeps what is at least min_p times as likely as the most
    likely token; it comes first, as in vLLM. Top-k keeps every token that ties with the k-th. Top-p (Holtzman et al.,
    "The curious case of neural text degeneration", ICLR 2020) keeps the fewest of the most likely tokens that
    together reach p; ties go to lower ids.
    """
    row = row.double()
    scaled = (row - row.max()) / how.temperature  # at most 0, so that no temperature is too low
    if how.min_p > 0:
        scaled = scaled.masked_fill(scaled < scaled.max() + math.log(how.min_p), float("-inf"))
    if 0 < how.top_k < len(row):
        scaled = scaled.masked_fill(scaled < scaled.topk(how.top_k).values[-1], float("-inf"))
    probabilities = scaled.softmax(-1)
    if how.top_p < 1.0:
        ordered, ids = probabilities.sort(descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        excluded = before >= how.top_p
        excluded[0] = False  # even p = 0 leaves the most likely token
        probabilities = probabilities.index_fill(0, ids[excluded], 0.0)
    return probabilities


def _draw(probabilities: Tensor, u: float) -> int:
    """The inverse of the cumulative distribution at u, in order of token ids.

    Not in order of probability: two tokens that change places for a last-bit difference of their logits would move
    everything behind them, whereas this way such a difference moves the borders by as much and no more.
    """
    cumulative = probabilities.cumsum(-1)
    total = cumulative[-1]
    token = int(torch.searchsorted(cumulative, u * total, right=True))
    # u * total may round up to total: then it is the last token that has any probability. And a model whose logits are
    # no numbers says something wrong, but a token.
    return min(token, int(torch.searchsorted(cumulative, total)), len(cumulative) - 1)
