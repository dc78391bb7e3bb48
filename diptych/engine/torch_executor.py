"""The executor that computes: packs a step into one row of tokens, runs the model over the paged pool, samples.

Prompts of which a vector is wanted (`pooling.py`) are a row and a forward of their own: they need no vocabulary.

A step is laid out and computed in `collect`, in launch order; `launch` only notes what it was told, so it is cheap
and may run ahead by a step. Not responsible for decisions, nor for the model's inside (`adapter.py`, `attention.py`).
"""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diptych.engine.adapter import Model
from diptych.engine.attention import PagedKV, lay_out
from diptych.engine.executor import Result, Sampling
from diptych.engine.grammar import Grammars
from diptych.engine.layouts import kv_layout
from diptych.engine.pooling import pool
from diptych.engine.sampler import choose
from diptych.engine.scoring import cut, scores
from diptych.engine.sequence import InOrder, Launch, Piece, SequenceTable
from diptych.engine.shaping import shaped
from diptych.errors import ConfigError
from diptych.policy.messages import Run
from diptych.transfer.pool import Pool

__all__ = ["TorchExecutor", "kv_layout", "pages_of"]


class TorchExecutor:
    """An `Executor` over a loaded model and a pool of `kv_layout`. `num_threads` is torch's, for the whole process.

    On a device other than the CPU the KV lives in device memory and the pool's own bytes are not used: transfers
    from there do not exist yet, and that path has never been run.
    """

    def __init__(self, model: Model, pool: Pool, num_threads: int | None = None) -> None:
        if num_threads:
            torch.set_num_threads(num_threads)
        self.model = model
        self.pool = pool
        pages = pages_of(pool)
        if pages.dtype != model.dtype:
            raise ConfigError(f"the pool holds {pages.dtype}, the model computes in {model.dtype}: they must agree")
        pool.layout.check(kv_layout(model.facts, pool.layout.dtype, pool.layout.block_size))
        if model.device.type != "cpu":
            pages = torch.zeros_like(pages, device=model.device)
        self._kv = PagedKV(pages)
        self._sequences = SequenceTable(pool.layout.block_size)
        self._steps = InOrder(self._compute)
        self._known_grammars: Grammars | None = None

    def admit(self, rid: int, tokens: list[int], num_prompt: int, sampling: Sampling) -> None:
        """Make a sequence known."""
        self._sequences.admit(rid, tokens, num_prompt, sampling)

    def extend(self, rid: int, tokens: list[int]) -> None:
        """Append token ids computed elsewhere."""
        self._sequences.extend(rid, tokens)

    def tokens(self, rid: int) -> list[int]:
        """All token ids known of a sequence (the live list)."""
        return self._sequences.tokens(rid)

    def forget(self, rid: int) -> None:
        """Drop a sequence."""
        self._sequences.forget(rid)

    def truncate(self, rid: int, num_tokens: int) -> None:
        """Keep only the first `num_tokens` ids."""
        self._sequences.truncate(rid, num_tokens)

    def launch(self, step: Run) -> Launch:
        """Note a step."""
        return self._steps.add(Launch(self._sequences.take(step), time.monotonic()))

    def collect(self, handle: Launch) -> Result:
        """Compute all steps up to this one; returns what it sampled. `elapsed_s` is computing time alone."""
        return self._steps.finish(handle)

    def _compute(self, launch: Launch) -> Result:
        begin_s = time.monotonic()
        result = Result()
        pooled = [piece for piece in launch.pieces if piece.sequence.sampling.pooling]
        if pooled:
            self._pool(pooled, result)
        if len(pooled) < len(launch.pieces):
            self._go_on([piece for piece in launch.pieces if not piece.sequence.sampling.pooling], result)
        result.elapsed_s = time.monotonic() - begin_s
        return result

    def _pool(self, pieces: list[Piece], result: Result) -> None:
        """Compute prompts of which a vector is wanted."""
        batch = lay_out(pieces, self._kv)
        states = self.model.hidden(batch)
        for piece, last in zip(pieces, batch.last, strict=True):
            vector = pool(piece, states[last - piece.count + 1 : last + 1])
            if vector is not None:
                if piece.sequence.sampling.pooling == "labels":
                    vector = self.model.labels(vector)
                result.vectors[piece.rid] = vector.float().cpu().numpy().tobytes()

    def _go_on(self, pieces: list[Piece], result: Result) -> None:
        """Compute prompts and answers that want a token."""
        batch = lay_out(pieces, self._kv)
        sampled = [(piece, last) for piece, last in zip(pieces, batch.last, strict=True) if piece.sample]
        read = [span for piece, last in zip(pieces, batch.last, strict=True) if (span := _read(piece, last))]
        keep = [last for _, last in sampled] + [row for span in read for row in span.rows]
        logits = self.model.logits(batch, keep)
        if sampled:
            self._sample([piece for piece, _ in sampled], logits[: len(sampled)], result)
        begin = len(sampled)
        for span in read:
            end = begin + len(span.rows)
            result.prompt_scores[span.rid] = span.first, scores(logits[begin:end], span.ids, span.num_top)
            begin = end

    def _sample(self, pieces: list[Piece], logits: Tensor, result: Result) -> None:
        hows = [piece.sequence.sampling for piece in pieces]
        histories = [(piece.sequence.tokens, piece.sequence.num_prompt) for piece in pieces]
        tokens = choose(shaped(logits, hows, histories, self._masks(pieces)), hows, [piece.end for piece in pieces])
        # Scores are the model's own, whatever was shaped.
        asked = [row for row, how in enumerate(hows) if how.logprobs >= 0]
        if asked:
            num_top = max(hows[row].logprobs for row in asked)
            found = scores(logits[asked], [tokens[row] for row in asked], num_top)
            result.scores = {
                pieces[row].rid: cut(score, hows[row].logprobs) for row, score in zip(asked, found, strict=True)
            }
        for piece, token in zip(pieces, tokens, strict=True):
            result.tokens.append((piece.rid, token, piece.sequence.append_sampled(token)))

    def _masks(self, pieces: list[Piece]) -> dict[int, NDArray[np.bool_]]:
        """What grammars exclude, by row."""
        masks = {}
        for row, piece in enumerate(pieces):
            sequence = piece.sequence
            if sequence.sampling.grammar:
                if sequence.matcher is None:
                    sequence.matcher = self._grammars().matcher(sequence.sampling.grammar)
                masks[row] = sequence.matcher.allowed(sequence.tokens[sequence.num_prompt :])
        return masks

    def _grammars(self) -> Grammars:
        if self._known_grammars is None:
            facts = self.model.facts
            self._known_grammars = Grammars(Path(facts.folder), facts.vocab, facts.eos_ids)
        return self._known_grammars


@dataclass(frozen=True, slots=True)
class _Span:
    """Prompt tokens `ids` from position `first`, whose log-probabilities are wanted, and the rows that say them."""

    rid: int
    first: int
    ids: list[int]
    rows: range
    num_top: int


def _read(piece: Piece, last: int) -> _Span | None:
    """Which prompt tokens a slice says the probabilities of: each of its tokens those of the one after it."""
    sequence = piece.sequence
    first, end = piece.start + 1, min(piece.end + 1, sequence.num_prompt)
    if sequence.sampling.prompt_logprobs < 0 or first >= end:
        return None
    row = last - piece.count + 1
    rows = range(row, row + end - first)
    return _Span(piece.rid, first, sequence.tokens[first:end], rows, sequence.sampling.prompt_logprobs)


def pages_of(pool: Pool) -> Tensor:
    """The pool's bytes as a tensor [block, layer, K/V, head, token, dim] that shares their memory."""
    dtype = getattr(torch, pool.layout.dtype)
    return torch.from_numpy(pool.view.reshape(-1)).view(dtype).view(pool.num_blocks, *pool.layout.shape)
