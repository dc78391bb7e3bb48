"""Attention over the paged pool: writes a step's keys and values, reads everyone's context.

A step's new tokens lie in one row: first those that C++ answers (`kernels.py`): sequences with few of them, decodes
above all, and pieces of prompt where it is faster. What it does not answer torch does, decodes batched by similar
length, prompts one by one; what torch's fused attention cannot do (capped scores, sinks) goes to `plain.py`.
All indices are made once per step and serve every layer. Sequences never see each other: not through masks, and not
through stale bytes, since the unwritten tail of a block is zeroed when the block is begun. A layer's window is a
mask: the KV before it is kept all the same. Not responsible for block ids, positions or the model around it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from diptych.engine import kernels, plain
from diptych.engine.features import Features, features_of
from diptych.engine.sequence import Piece
from diptych.errors import UnsupportedModel

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
    ends: Tensor  # [sequences]: their tokens
    masks: dict[int | None, Tensor] = field(default_factory=dict)  # by window

    def attend(self, kv: PagedKV, layer: int, query: Tensor, features: Features) -> Tensor:
        """query [heads, sequences, dim] -> [sequences, heads, dim]."""
        count = self.end - self.first
        keys, values = kv.gather(layer, self.index, count)
        # The query heads that share a KV head become rows of one small matrix: nothing is repeated.
        rows = query.transpose(0, 1).reshape(count, kv.num_heads, -1, kv.dim)
        mask = self._mask(keys, features.window)
        if features.fused:
            out = scaled_dot_product_attention(rows, keys, values, attn_mask=mask, scale=features.scale)
        else:
            out = plain.attend(rows, keys, values, mask, features)
        return out.reshape(count, -1, kv.dim)

    def _mask(self, keys: Tensor, window: int | None) -> Tensor:
        """[sequences, 1, 1, tokens], 0 or -inf; made once per window and step."""
        if window not in self.masks:
            tokens = torch.arange(keys.shape[-2], device=keys.device)[None]
            hidden = tokens >= self.ends[:, None]
            if window:
                hidden |= tokens < self.ends[:, None] - window
            mask = torch.zeros(hidden.shape, dtype=keys.dtype, device=keys.device)
            self.masks[window] = mask.masked_fill_(hidden, float("-inf"))[:, None, None]
        return self.masks[window]


@dataclass(frozen=True, slots=True)
class Fresh:
    """Tokens `first .. end` of a step are the beginning of one sequence: they attend to each other only."""

    first: int
    end: int
    masks: dict[int | None, Tensor] = field(default_factory=dict)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, features: Features) -> Tensor:
        """query [heads, count, dim], key and value [KV heads, count, dim] -> [count, heads, dim]."""
        if not features.fused or features.window and features.window < self.end - self.first:
            return _attend_masked(query, key, value, features, self.masks)
        q, k, v = _by_group(query, key, value)
        return _flatten(scaled_dot_product_attention(q, k, v, is_causal=True, scale=features.scale))


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens `first .. end` of a step continue one sequence that has `num_tokens` with them."""

    first: int
    end: int
    num_tokens: int
    index: Tensor
    masks: dict[int | None, Tensor] = field(default_factory=dict)

    def attend(self, kv: PagedKV, layer: int, query: Tensor, features: Features) -> Tensor:
        """query [heads, count, dim] -> [count, heads, dim]."""
        keys, values = kv.gather(layer, self.index, 1)[:, 0, :, : self.num_tokens]
        return _attend_masked(query, keys, values, features, self.masks)


def _attend_masked(
    query: Tensor, key: Tensor, value: Tensor, features: Features, masks: dict[int | None, Tensor]
) -> Tensor:
    """A sequence's last queries [heads, count, dim] over all its keys [KV heads, tokens, dim] -> [count, heads, dim].

    `masks` keeps, for the other layers of the step, the mask of each window.
    """
    count, num_tokens = query.shape[1], key.shape[1]
    window = features.window if features.window and features.window < num_tokens else None
    if window not in masks:
        masks[window] = reversed_causal(count, num_tokens, key, window)
    mask = masks[window]
    q, k, v = _by_group(query.flip(1), key, value)
    if features.fused:
        return _flatten(scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=features.scale)).flip(0)
    return _flatten(plain.attend_reversed(q, key, value, mask, features)).flip(0)


def _by_group(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[KV heads, queries per KV head, tokens, dim] each; keys and values are expanded without a copy."""
    num_heads, (heads, count, dim) = key.shape[0], query.shape
    group = heads // num_heads
    shape = (num_heads, group, -1, dim)
    return query.reshape(num_heads, group, count, dim), key[:, None].expand(shape), value[:, None].expand(shape)


def _flatten(out: Tensor) -> Tensor:
    """[KV heads, group, tokens, dim] -> [tokens, heads, dim]."""
    return out.flatten(0, 1).transpose(0, 1)


def reversed_causal(count: int, num_tokens: int, like: Tensor, window: int | None) -> Tensor:
    """The causal mask [count, num_tokens] of a sequence's last `count` queries, taken last to first.

    Query i then sees keys up to num_tokens - 1 - i, or the last `window` of those, so entry (i, j) depends on i + j
    only: one line of numbers seen through strides (1, 1) is the whole matrix. 512 queries over 128k tokens cost 0.5 MB
    instead of 256.
    """
    line = torch.zeros(num_tokens + count - 1, dtype=like.dtype, device=like.device)
    line[num_tokens:] = float("-inf")
    if window:
        line[: num_tokens - window] = float("-inf")
    mask = line.as_strided((count, num_tokens), (1, 1))
    return mask if like.device.type == "cpu" else mask.contiguous()  # kernels elsewhere want aligned rows (never run)


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
    fusable: bool = True  # whole layers may be computed natively (`fusion.py`)
    asked: dict[int, Features] = field(default_factory=dict)  # by layer, what attention was asked for

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, features: Features) -> Tensor:
        """query [heads, tokens, dim], key and value [KV heads, tokens, dim] -> [tokens, heads, dim]."""
        self.num_calls += 1
        out = query.new_empty(query.shape[1], query.shape[0], query.shape[2])
        if isinstance(self.store, Tensor):
            self.kv.write(layer, self.store, key, value)
        else:
            sinks = None if features.sinks is None else features.sinks.float().contiguous()
            window, softcap = features.window or 0, features.softcap or 0.0
            self.store.attend(layer, query, key, value, out, features.scale, window, softcap, sinks)
        for segment in self.segments:
            span = slice(segment.first, segment.end)
            match segment:
                case Fresh():
                    out[span] = segment.attend(query[:, span], key[:, span], value[:, span], features)
                case _:
                    out[span] = segment.attend(self.kv, layer, query[:, span], features)
        return out


def lay_out(pieces: Sequence[Piece], kv: PagedKV) -> Batch:
    """Make a step's indices, and zero the blocks it begins but does not fill. No loop over tokens or blocks."""
    alone = _is_decode if kv.kernel is None else kv.kernel.answers
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
            yield Chunk(first, first + piece.count, piece.end, kv.row_index(piece.blocks[None]))


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
    ends = torch.tensor([piece.end for piece in pieces], device=kv.device)
    return Decodes(first, first + len(pieces), kv.row_index(tables), ends)


# Metadata reaches the attention function through here, not through the model's keyword arguments: wrappers around
# a model (pipeline stages, for one) drop keywords they do not know. One forward runs at a time.
_current: Batch | None = None


def current_batch() -> Batch | None:
    """The batch of the forward that runs now."""
    return _current


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

    Returns [1, tokens, heads, dim]. Masks are ours to make: one passed by the model is refused. Values narrower than
    keys (DeepSeek) are stored as wide as keys.
    """
    batch = _current
    if batch is None:
        raise RuntimeError("paged attention was called outside a forward context")
    features = features_of(module, query.shape[-1], attention_mask, kwargs)
    batch.asked[module.layer_idx] = features
    kv, width = batch.kv, value.shape[-1]
    if key.shape[1] != kv.num_heads or key.shape[-1] != kv.dim or width > kv.dim:
        raise UnsupportedModel(
            f"layer {module.layer_idx} has {key.shape[1]} KV heads of {key.shape[-1]} (keys) and {width} (values), "
            f"where config.json says {kv.num_heads} of {kv.dim} for every layer"
        )
    if width == kv.dim:
        return batch.attend(module.layer_idx, query[0], key[0], value[0], features)[None], None
    value = pad(value, (0, kv.dim - width))
    return batch.attend(module.layer_idx, query[0], key[0], value[0], features)[None, ..., :width], None
