"""Log-probabilities of tokens, as the model gave them. Not responsible for choosing a token, nor for who asked."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from diptych.engine.executor import Score

_ROWS = 64  # of a long prompt at a time: a log-softmax of [rows, vocab] is memory on top of the logits


def scores(logits: Tensor, tokens: Sequence[int], num_top: int) -> list[Score]:
    """One Score for each row of logits [rows, vocab] and the token that came of it, with the `num_top` most likely."""
    found: list[Score] = []
    for begin in range(0, len(tokens), _ROWS):
        found += _scores(logits[begin : begin + _ROWS], tokens[begin : begin + _ROWS], num_top)
    return found


def _scores(logits: Tensor, tokens: Sequence[int], num_top: int) -> list[Score]:
    logprobs = logits.float().log_softmax(-1)
    chosen = torch.tensor(tokens, device=logits.device)[:, None]
    own = logprobs.gather(-1, chosen)
    ranks: list[int] = (1 + (logprobs > own).sum(-1)).tolist()
    best, best_ids = logprobs.topk(min(num_top, logits.shape[-1]))
    ids = torch.cat((chosen, best_ids), -1).cpu().numpy().astype(np.int32)
    values = torch.cat((own, best), -1).cpu().numpy()
    return [Score(ranks[row], ids[row].tobytes(), values[row].tobytes()) for row in range(len(ranks))]


def cut(score: Score, num_top: int) -> Score:
    """The same with fewer alternatives."""
    end = 4 * (1 + num_top)
    return Score(score.rank, score.ids[:end], score.values[:end])
