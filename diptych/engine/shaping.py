"""What is done to logits before a token is chosen: bias, penalties, masks, for all rows of a step at once.

Functions of a row's logits, its parameters and its token ids alone, so that a handover, a preemption or a resumption
changes nothing: both sides have the ids. Rows that ask for nothing are not touched, and a step of such
rows is not even copied. Not responsible for choosing (`sampler.py`).
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diptych.engine.executor import Sampling

History = tuple[list[int], int]
"""All token ids of a sequence, and how many of them are its prompt."""

_Changes = tuple[NDArray[np.int64], NDArray[np.float32]]
"""What one row wants: token ids, each once, and a number for each."""

_NO_MASKS: Mapping[int, NDArray[np.bool_]] = {}
_NONE: _Changes = (np.empty(0, np.int64), np.empty(0, np.float32))


def shaped(
    logits: Tensor,
    sampling: Sequence[Sampling],
    histories: Sequence[History],
    masks: Mapping[int, NDArray[np.bool_]] = _NO_MASKS,
) -> Tensor:
    """Logits [rows, vocab] with bias, then penalties, then what masks (by row) and allowed ids leave, and no early end.

    float32 where anything was done, otherwise what came in.

    The repetition penalty is that of Keskar et al. (CTRL, 2019) as `transformers` has it: a positive logit of a token
    that occurs in prompt or answer is divided, a negative one multiplied. Presence and frequency are OpenAI's, and
    look at the answer alone.
    """
    if not masks and not any(map(_asks, sampling)) and not any(map(_is_early, sampling, histories)):
        return logits
    out = logits.to(torch.float32, copy=True)
    _apply(out, sampling, histories, _bias, torch.add)
    _apply(out, sampling, histories, _repeated, _penalise)
    _apply(out, sampling, histories, _written, torch.sub)
    for row, mask in masks.items():
        out[row].masked_fill_(torch.from_numpy(~mask).to(out.device), float("-inf"))
    for row, how in enumerate(sampling):
        if how.allowed_ids:
            _keep(out[row], list(how.allowed_ids))
    for row, (how, history) in enumerate(zip(sampling, histories, strict=True)):
        if _is_early(how, history):
            _hold_off(out[row], list(how.stop_ids))
    return out


def _asks(how: Sampling) -> bool:
    penalised = how.repetition_penalty != 1.0 or how.presence_penalty or how.frequency_penalty
    return bool(how.logit_bias or how.allowed_ids or penalised)


def _is_early(how: Sampling, history: History) -> bool:
    """A stop token may not be written yet."""
    return bool(how.min_new and how.stop_ids) and len(history[0]) - history[1] < how.min_new


def _keep(row: Tensor, ids: list[int]) -> None:
    """Exclude all other tokens, unless a grammar left none of these: then it has its way."""
    kept = row[ids]
    if bool((kept > float("-inf")).any()):
        row.fill_(float("-inf"))
        row[ids] = kept


def _hold_off(row: Tensor, stop_ids: list[int]) -> None:
    """Exclude the stop tokens, unless a grammar left nothing else: then it is at its end."""
    held = row.clone()
    held[stop_ids] = float("-inf")
    if bool((held > float("-inf")).any()):
        row.copy_(held)


def _apply(
    out: Tensor,
    sampling: Sequence[Sampling],
    histories: Sequence[History],
    changes: Callable[[Sampling, History], _Changes],
    combine: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Change the places that rows ask for, all rows together: gather, combine, scatter; no place is named twice."""
    wanted = [changes(how, history) for how, history in zip(sampling, histories, strict=True)]
    rows = np.repeat(np.arange(len(wanted)), [len(ids) for ids, _ in wanted])
    if len(rows):
        at = torch.from_numpy(rows), torch.from_numpy(np.concatenate([ids for ids, _ in wanted]))
        values = torch.from_numpy(np.concatenate([values for _, values in wanted])).to(out.device)
        out[at] = combine(out[at], values)


def _penalise(logits: Tensor, penalties: Tensor) -> Tensor:
    return torch.where(logits < 0, logits * penalties, logits / penalties)


def _bias(how: Sampling, history: History) -> _Changes:
    if not how.logit_bias:
        return _NONE
    ids, values = zip(*how.logit_bias, strict=True)
    return np.array(ids, np.int64), np.array(values, np.float32)


def _repeated(how: Sampling, history: History) -> _Changes:
    if how.repetition_penalty == 1.0:
        return _NONE
    ids = np.unique(np.array(history[0], np.int64))
    return ids, np.full(len(ids), how.repetition_penalty, np.float32)


def _written(how: Sampling, history: History) -> _Changes:
    if not (how.presence_penalty or how.frequency_penalty):
        return _NONE
    tokens, num_prompt = history
    ids, counts = np.unique(np.array(tokens[num_prompt:], np.int64), return_counts=True)
    return ids, (how.presence_penalty + how.frequency_penalty * counts).astype(np.float32)
