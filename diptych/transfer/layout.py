"""What the bytes of a paged KV pool mean, as a value two workers can compare.

A block holds `block_size` tokens of every layer. Its cache groups (layers that share a shape) lie one after the
other; inside a group the order is layer, then keys before values, then head, token, dim. So a whole block is one
piece, a layer range too, and a head slice two pieces per layer. Layouts travel between workers (msgspec encodes them).

Not responsible for memory (`pool.py`), for copying (`copying.py`), or for which blocks belong to whom.
"""

from dataclasses import dataclass, fields
from hashlib import blake2b
from typing import Any, Literal

import msgspec

from diptych.errors import ConfigError, LayoutMismatch, ProtocolError

DEFAULT_ORDER = "block layer kv head token dim"
WORD_BYTES = 8  # checksums run over 64-bit words, so a block is a whole number of them
MAX_COUNT = 1 << 20  # no dimension of a real cache comes near; keeps a peer's nonsense out of our arithmetic

ITEM_BYTES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int8": 1,
    "uint8": 1,
}

Pieces = tuple[tuple[int, int], ...]  # (offset, length) in bytes, within a block


@dataclass(frozen=True, slots=True)
class Group:
    """Layers whose cache has one shape. `value_dim` 0 means that keys are all there is (latent attention)."""

    layers: tuple[int, ...]
    kv_heads: int
    key_dim: int
    value_dim: int
    kind: Literal["full", "window", "latent"] = "full"

    def __post_init__(self) -> None:
        counts = (len(self.layers), self.kv_heads, self.key_dim)
        if min(counts) < 1 or self.value_dim < 0 or max(*counts, self.value_dim) > MAX_COUNT:
            raise ConfigError(f"a cache group needs layers, KV heads and sizes between 1 and {MAX_COUNT}: {self}")

    @property
    def row_dim(self) -> int:
        """Elements of one token in one head of one layer, keys and values together."""
        return self.key_dim + self.value_dim

    def card(self) -> str:
        """In words."""
        count = len(self.layers)
        layers = f"{count} {self.kind} layer{'s' if count > 1 else ''}"
        return f"{layers} x {self.kv_heads} KV heads x ({self.key_dim} key + {self.value_dim} value)"


@dataclass(frozen=True, slots=True)
class Layout:
    """The shape of a pool's blocks. `model` is a fingerprint of the checkpoint the KV belongs to.

    Raises ConfigError where the numbers make no block (unknown dtype, sizes below 1, bytes not a multiple of 8).
    """

    block_size: int  # tokens
    dtype: str
    groups: tuple[Group, ...]
    model: str
    order: str = DEFAULT_ORDER

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_BYTES:
            raise ConfigError(f"no KV dtype {self.dtype!r}; known are {', '.join(ITEM_BYTES)}")
        if not self.groups or not 1 <= self.block_size <= MAX_COUNT:
            raise ConfigError(f"a layout needs a cache group and 1 to {MAX_COUNT} tokens per block")
        if self.order != DEFAULT_ORDER:
            raise ConfigError(f"axis order {self.order!r} is not supported; only {DEFAULT_ORDER!r} is")
        if self.block_bytes % WORD_BYTES:
            raise ConfigError(f"blocks of {self.block_bytes} bytes are not a multiple of {WORD_BYTES}: {self.card()}")

    @classmethod
    def uniform(
        cls, *, layers: int, kv_heads: int, head_dim: int, block_size: int, dtype: str, model: str = ""
    ) -> "Layout":
        """The usual case: one group of identical full-attention layers, keys as wide as values."""
        group = Group(tuple(range(layers)), kv_heads, head_dim, head_dim)
        return cls(block_size, dtype, (group,), model)

    @property
    def item_bytes(self) -> int:
        """Bytes of one element."""
        return ITEM_BYTES[self.dtype]

    @property
    def token_bytes(self) -> int:
        """Bytes one token takes over all layers."""
        return self.item_bytes * sum(len(g.layers) * g.kv_heads * g.row_dim for g in self.groups)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return self.block_size * self.token_bytes

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """(layers, 2, heads, block_size, dim) of one block; ConfigError where there is more than one such shape."""
        group = self._only_group()
        if group.key_dim != group.value_dim:
            raise ConfigError(f"keys and values differ in size, so a block has no single shape: {self.card()}")
        return (len(group.layers), 2, group.kv_heads, self.block_size, group.key_dim)

    def fingerprint(self) -> str:
        """32 hex digits that are equal exactly where the layouts are."""
        return blake2b(msgspec.msgpack.encode(self), digest_size=16, person=b"diptych-layout-1").hexdigest()

    def card(self) -> str:
        """One line for people."""
        groups = " and ".join(group.card() for group in self.groups)
        size = f"{self.block_size} tokens per block ({self.block_bytes} bytes)"
        return f"{groups}, {self.dtype}, {size}, order {self.order!r}, model {self.model or 'unnamed'!r}"

    def check(self, other: "Layout") -> None:
        """Raise LayoutMismatch unless blocks of `other` can be copied as they are into ours."""
        if self == other:
            return
        field, ours, theirs = _first_difference(self, other)
        raise LayoutMismatch(
            f"the KV pools do not fit together: {field} is {ours!r} here and {theirs!r} there; "
            f"here: {self.card()}; there: {other.card()}"
        )

    def pieces(self, layers: tuple[int, int] | None, heads: tuple[int, int] | None) -> Pieces:
        """Where in a block a layer range and a KV-head range lie: (offset, length) in bytes, merged where they touch.

        Layers count by their place in the group. Raises ProtocolError for empty or impossible ranges.
        """
        group = self._only_group()
        first_layer, end_layer = _range("layers", layers, len(group.layers))
        first_head, end_head = _range("heads", heads, group.kv_heads)
        token_row = self.block_size * self.item_bytes
        layer_bytes = group.kv_heads * group.row_dim * token_row
        if (first_head, end_head) == (0, group.kv_heads):
            return ((first_layer * layer_bytes, (end_layer - first_layer) * layer_bytes),)
        values = group.kv_heads * group.key_dim * token_row  # where values begin within a layer
        runs = []
        for layer in range(first_layer, end_layer):
            for start, head_bytes in ((0, group.key_dim * token_row), (values, group.value_dim * token_row)):
                offset = layer * layer_bytes + start + first_head * head_bytes
                runs.append((offset, (end_head - first_head) * head_bytes))
        return tuple(run for run in runs if run[1])

    def _only_group(self) -> Group:
        if len(self.groups) != 1:
            raise ConfigError(f"this needs a cache of one group of layers, not {len(self.groups)}: {self.card()}")
        return self.groups[0]


def _range(name: str, wanted: tuple[int, int] | None, count: int) -> tuple[int, int]:
    if wanted is None:
        return 0, count
    first, end = wanted
    if not 0 <= first < end <= count:
        raise ProtocolError(f"{name} {first} to {end} are not among the {count} there are")
    return first, end


def _first_difference(ours: Any, theirs: Any, path: str = "") -> tuple[str, object, object]:
    """The path and both values of the first field in which two layouts (or groups) differ."""
    for field in fields(ours):
        left, right = getattr(ours, field.name), getattr(theirs, field.name)
        if left == right:
            continue
        if field.name != "groups" or len(left) != len(right):
            shown = (len(left), len(right)) if field.name in ("groups", "layers") and len(left) != len(right) else None
            name = f"number of {path}{field.name}" if shown else f"{path}{field.name}"
            return name, *(shown or (left, right))
        index = next(i for i, pair in enumerate(zip(left, right, strict=True)) if pair[0] != pair[1])
        return _first_difference(left[index], right[index], f"groups[{index}].")
    raise AssertionError("equal layouts have no first difference")
