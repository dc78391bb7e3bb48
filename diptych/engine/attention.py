"""Attention over the paged pool: writes a step's keys and values, reads everyone's context.

A step's new tokens lie in one row: first those of sequences with few of them (decodes above all), then prompt pieces
one by one. C++ answers the former (`kernels.py`); where it cannot, torch does, decodes batched by similar length.
Prompt pieces are torch's either way. All indices are made once per step and serve every layer. Sequences never see
each other: not through masks, and not through stale bytes, since the unwritten tail of a block is zeroed when the
block is begun. Not responsible for block ids, positions or the model around it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from diptych.engine import kernels
from diptych.engine.sequence import Piece

# Decodes gathered together: at most this many bytes of K and V, so that the copy stays in cache until it is read.
GATHER_BYTES = 8 << 20


class PagedKV:
    """The pool as attention sees it: `pages` [block, layer, K/V, head, token, dim], contiguous."""

    def __init__(self, pages: Tensor) -> None:
        self.pages = pages
        self.kernel = kernels.find(pages)
        self.num_layers, _, self.num_heads, self.block_size, self.dim = pages.shape[1:]
        self.device, self.dtype = pages.device, pages.dtype
        self._rows = pages.view(-1, self.block_size * self.dim)  # one for each (block, layer, K/V, head)
        self._slots = pages.view(-1, self.dim)  # one for each (block, layer, K/V, head, token)
        self._scratch = pages.new_empty(0)

    def row_bytes(self, blocks: int) -> int:
        """Bytes of K and V of one layer in so many blocks."""
        return 2 * self.num_heads * blocks * self.block_size * self.dim * self.dtype.itemsize

    def row_index(self, tables: np.ndarray) -> Tensor:
        """Where the rows of layer 0 lie, flat [K/V, sequence, head, block]; tables is int [sequences, blocks]."""
        heads = np.arange(2 * self.num_heads).reshape(2, 1, self.num_heads, 1)
        first = tables.astype(np.int64)[None, :, None, :] * (self.num_layers * 2 * self.num_heads)
        return torch.from_numpy((first + heads).reshape(-1)).to(self.device)

    def slot_index(self, blocks: np.ndarray, offsets: np.ndarray) -> Tensor:
        """Where tokens go in layer 0: int64 [2, tokens * heads], for keys and for values."""
        heads = np.arange(2 * self.num_heads).reshape(2, 1, self.num_heads) * self.block_size
        first = blocks.astype(np.int64) * (self.num_layers * 2 * self.num_heads * self.block_size) + offsets
        return torch.from_numpy((first[None, :, None] + heads).reshape(2, -1)).to(self.device)

    def gather(self, layer: int, index: Tensor, num_sequences: int) -> Tensor:
        """K and V of one layer by `row_index`: [2, sequences, heads, tokens, dim]; valid until the next gather."""
        size = index.numel() * self._rows.shape[1]
        if self._scratch.numel() < size:
            # Kept from call to call: fresh memory of this size would cost more in page faults than the copy itself.
            self._scratch = self.pages.new_empty(size)
        out = self._scratch[:size].view(index.numel(), -1)
        # A layer's rows follow each other at a fixed distance, so an offset moves the index from layer 0 to this one.
        torch.index_select(self._rows[layer * 2 * self.num_heads :], 0, index, out=out)
        return out.view(2, num_sequences, self.num_heads, -1, self.dim)

    def write(self, layer: int, index: Tensor, key: Tensor, value: Tensor) -> None:
        """Store keys and values [heads, tokens, dim] of one layer by `slot_index`."""
        slots = self._slots[layer * 2 * self.num_heads * self.block_size :]
        for half, new in enumerate((key, value)):
            slots.index_copy_(0, index[half], new.transpose(0, 1).reshape(-1, self.dim))

    def clear(self, blocks: list[int]) -> None:
        """Zero whole blocks, all layers."""
        self.pages.index_fill_(0, torch.tensor(blocks, device=self.device), 0)


@dataclass(frozen=True, slots=True)
class Decodes:
    """Tokens `first .. end` of a step, one of each of as many sequences of similar length."""

    first: int
    end: int
    index: Tensor
    mask: Tensor  # [sequences, 1, 1, tokens], 0 or -inf

    def attend(self, kv: PagedKV, layer: int, query: Tensor, scale: float) -> Tensor:
        """query [heads, sequences, dim] -> [sequences, heads, dim]."""
        count = self.end - self.first
        keys, values = kv.gather(layer, self.index, count)
        # The query heads that share a KV head become rows of one small matrix: nothing is repeated.
        rows = query.transpose(0, 1).reshape(count, kv.num_heads, -1, kv.dim)
        out = scaled_dot_product_attention(rows, keys, values, attn_mask=self.mask, scale=scale)
        return out.reshape(count, -1, kv.dim)


@dataclass(frozen=True, slots=True)
class Fresh:
    """Tokens `first .. end` of a step are the beginning of one sequence: they attend to each other only."""

    first: int
    end: int

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """query [heads, count, dim], key and value [KV heads, count, dim] -> [count, heads, dim]."""
        q, k, v = _by_group(query, key, value)
        return _flatten(scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale))


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens `first .. end` of a step continue one sequence that has `num_tokens` with them."""

    first: int
    end: int
    num_tokens: int
    index: Tensor
    mask: Tensor  # [count, tokens]: for the queries in reverse order, see `_reversed_causal`

    def attend(self, kv: PagedKV, layer: int, query: Tensor, scale: float) -> Tensor:
        """query [heads, count, dim] -> [count, heads, dim]."""
        keys, values = kv.gather(layer, self.index, 1)[:, 0, :, : self.num_tokens]
        q, k, v = _by_group(query.flip(1), keys, values)
        return _flatten(scaled_dot_product_attention(q, k, v, attn_mask=self.mask, scale=scale)).flip(0)


def _by_group(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[KV heads, queries per KV head, tokens, dim] each; keys and values are expanded without a copy."""
    num_heads, (heads, count, dim) = key.shape[0], query.shape
    group = heads // num_heads
    shape = (num_heads, group, -1, dim)
    return query.reshape(num_heads, group, count, dim), key[:, None].expand(shape), value[:, None].expand(shape)


def _flatten(out: Tensor) -> Tensor:
    """[KV heads, group, tokens, dim] -> [tokens, heads, dim]."""
    return out.flatten(0, 1).transpose(0, 1)


def _reversed_causal(count: int, num_tokens: int, kv: PagedKV) -> Tensor:
    """The causal mask [count, num_tokens] of a sequence's last `count` queries, taken last to first.

    Query i then sees keys 0 .. num_tokens - 1 - i, so entry (i, j) depends on i + j only: one line of numbers seen
    through strides (1, 1) is the whole matrix. 512 queries over 128k tokens cost 0.5 MB instead of 256.
    """
    line = torch.zeros(num_tokens + count - 1, dtype=kv.dtype, device=kv.device)
    line[num_tokens:] = float("-inf")
    mask = line.as_strided((count, num_tokens), (1, 1))
    return mask if kv.device.type == "cpu" else mask.contiguous()  # kernels elsewhere want aligned rows (never run)


@dataclass(slots=True)
class Batch:
    """A step, laid out: where its tokens are written, and who attends to what. `last[i]` is piece i's last token."""

    kv: PagedKV
    positions: Tensor  # int64 [tokens]
    token_ids: Tensor  # int64 [tokens]
    store: kernels.NativeStep | Tensor  # the native call, which also answers its pieces; or torch's slot index
    segments: list[Decodes | Fresh | Chunk]
    last: list[int]
    num_calls: int = field(default=0)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """query [heads, tokens, dim], key and value [KV heads, tokens, dim] -> [tokens, heads, dim]."""
        self.num_calls += 1
        out = query.new_empty(query.shape[1], query.shape[0], query.shape[2])
        if isinstance(self.store, Tensor):
            self.kv.write(layer, self.store, key, value)
        else:
            self.store.attend(layer, query, key, value, out, scale)
        for segment in self.segments:
            span = slice(segment.first, segment.end)
            match segment:
                case Fresh():
                    out[span] = segment.attend(query[:, span], key[:, span], value[:, span], scale)
                case _:
                    out[span] = segment.attend(self.kv, layer, query[:, span], scale)
        return out


def lay_out(pieces: Sequence[Piece], kv: PagedKV) -> Batch:
    """Make a step's indices, and zero the blocks it begins but does not fill. No loop over tokens or blocks."""
    alone = _is_decode if kv.kernel is None else _has_few_tokens
    small = sorted((i for i, p in enumerate(pieces) if alone(p)), key=lambda i: len(pieces[i].blocks))
    order = small + [i for i, p in enumerate(pieces) if not alone(p)]
    ordered = [pieces[i] for i in order]
    counts = np.array([p.count for p in ordered])
    ends = counts.cumsum()
    last = np.empty(len(pieces), np.int64)
    last[order] = ends - 1
    positions = np.concatenate([np.arange(p.start, p.end) for p in ordered])
    blocks = np.concatenate([p.blocks[np.arange(p.start, p.end) // kv.block_size] for p in ordered])
    begun = [int(p.blocks[-1]) for p in ordered if p.end % kv.block_size and p.start <= p.end - p.end % kv.block_size]
    if begun:
        kv.clear(begun)
    store, segments = _segments(ordered, len(small), blocks, positions % kv.block_size, kv)
    return Batch(
        kv,
        torch.from_numpy(positions).to(kv.device),
        torch.tensor([token for p in ordered for token in p.token_ids()], device=kv.device),
        store,
        [*segments, *_prompt_segments(ordered, len(small), ends - counts, kv)],
        last.tolist(),
    )


def _is_decode(piece: Piece) -> bool:
    return piece.count == 1 and piece.start > 0


def _has_few_tokens(piece: Piece) -> bool:
    return piece.count <= kernels.MAX_QUERIES


def _segments(
    ordered: list[Piece], num_small: int, blocks: np.ndarray, offsets: np.ndarray, kv: PagedKV
) -> tuple[kernels.NativeStep | Tensor, list[Decodes]]:
    """How tokens are stored, and what torch computes of the small pieces (nothing, where the kernel does)."""
    if kv.kernel is not None:
        return kernels.lay_out(kv.kernel, ordered[:num_small], blocks, offsets), []
    return kv.slot_index(blocks, offsets), list(_decode_groups(ordered[:num_small], kv))


def _prompt_segments(ordered: list[Piece], skip: int, firsts: np.ndarray, kv: PagedKV) -> Iterator[Fresh | Chunk]:
    for piece, first in zip(ordered[skip:], firsts[skip:].tolist(), strict=True):
        if piece.start == 0:
            yield Fresh(first, first + piece.count)
        else:
            mask = _reversed_causal(piece.count, piece.end, kv)
            yield Chunk(first, first + piece.count, piece.end, kv.row_index(piece.blocks[None]), mask)


def _decode_groups(decodes: list[Piece], kv: PagedKV) -> Iterator[Decodes]:
    """Cut decodes, shortest first, where padding would double the work or the gathered copy leave the cache."""
    first = 0
    for end in range(1, len(decodes) + 1):
        if end < len(decodes):
            width = len(decodes[end].blocks)
            fits = kv.row_bytes(width * (end + 1 - first)) <= GATHER_BYTES
            if fits and width <= 2 * len(decodes[first].blocks):
                continue
        yield _decode_group(decodes[first:end], first, kv)
        first = end


def _decode_group(pieces: list[Piece], first: int, kv: PagedKV) -> Decodes:
    width = len(pieces[-1].blocks)
    tables = np.empty((len(pieces), width), np.int32)
    for table, piece in zip(tables, pieces, strict=True):
        table[: len(piece.blocks)] = piece.blocks
        table[len(piece.blocks) :] = piece.blocks[-1]  # padding reads the sequence's own bytes, never a stranger's
    ends = torch.tensor([piece.end for piece in pieces])
    hidden = torch.arange(width * kv.block_size)[None] >= ends[:, None]
    mask = torch.zeros(hidden.shape, dtype=kv.dtype).masked_fill_(hidden, float("-inf"))
    return Decodes(first, first + len(pieces), kv.row_index(tables), mask[:, None, None].to(kv.device))


# Metadata reaches the attention function through here, not through the model's keyword arguments: wrappers around
# a model (pipeline stages, for one) drop keywords they do not know. One forward runs at a time.
_current: Batch | None = None


@contextmanager
def forward_context(batch: Batch) -> Iterator[None]:
    """While this is open, `paged_attention` works on `batch`."""
    global _current
    _current = batch
    try:
        yield
    finally:
        _current = None


def paged_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """The function transformers calls: query [1, heads, tokens, dim], key and value [1, KV heads, tokens, dim].

    Returns [1, tokens, heads, dim]. The mask is ours to make, so the one passed is ignored (it is None).
    """
    if _current is None:
        raise RuntimeError("paged attention was called outside a forward context")
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    return _current.attend(module.layer_idx, query[0], key[0], value[0], scale)[None], None
