"""Which codec blocks travel in over a wire, and when: raw, or int8 with a scale for each token and head.

int8 is lossy: what arrives is close to what was computed, not the same, so it is only used where it was asked for.
Encoded blocks carry two checksums, both taken at the source when it encodes: one of what travels, verified before it
is decoded, and one of the block as it was, compared with the one that was published. So damage on the way, and blocks
that were written again, are noticed as with raw ones.

`Chooser` decides for each read from what earlier ones measured: int8 where the bytes it saves would take the link
longer than encoding and decoding take, with room for what they varied by (as in TCP's timer: Jacobson 1988). Not
responsible for encoding (`native/int8.py`) nor for sending (`stream.py`).
"""

from dataclasses import dataclass

import numpy as np

from diptych.transfer import native
from diptych.transfer.layout import Layout
from diptych.transfer.native.int8 import DTYPES, Rows
from diptych.transfer.seam import Codec, Wish

STAGING_BYTES = 8 << 20  # raw bytes of what is encoded at once
MIN_BYTES = 64 << 10  # of KV; less is not worth a thought, nor fit to be measured
_WEIGHT = 0.25  # of the newest measurement
_GAIN = 0.05  # of the time that raw takes: for less, what is exact is not given up
_CAUTION = 2.0  # mean deviations that encoding and decoding may take longer than they do on average
_PROBES = 3  # int8 reads before the codec's speed is believed
_PROBE_EVERY = 256  # reads, after that: what was slow on a busy machine need not stay so
_DOUBT_EVERY = 16  # where it is the caution that speaks against it


def rows_of(layout: Layout) -> Rows | None:
    """What a block of that layout is made of; None where it is not rows of floats of one width."""
    widths = {dim for group in layout.groups for dim in (group.key_dim, group.value_dim) if dim}
    if layout.dtype not in DTYPES or len(widths) != 1:
        return None
    (dim,) = widths
    return Rows(layout.dtype, layout.block_bytes // (dim * layout.item_bytes), dim)


class Staging:
    """Memory for encoded blocks, allocated when it is first wanted, and then kept."""

    def __init__(self, shape: Rows | None):
        self.shape = shape
        self._memory: native.Blocks | None = None

    @property
    def room(self) -> int:
        """Blocks that fit."""
        assert self.shape is not None
        return max(STAGING_BYTES // self.shape.block_bytes, 1)

    def take(self, num_blocks: int) -> native.Blocks:
        """Memory for at most `room` encoded blocks; whoever had it before is through with it."""
        assert self.shape is not None
        if self._memory is None:
            self._memory = np.zeros((self.room, self.shape.encoded_bytes), dtype=np.uint8)
        return self._memory[:num_blocks]


@dataclass(frozen=True, slots=True)
class Choice:
    """How a read travels, and why."""

    codec: Codec
    why: str


@dataclass(slots=True)
class Chooser:
    """What one link, and the codec at both its ends, were measured to do. Bytes are of KV as it is, or `wire_bytes`."""

    shape: Rows | None
    link_bytes_per_s: float = 0.0  # 0: not measured yet
    codec_s_per_byte: float = 0.0  # encoding there and decoding here
    codec_spread: float = 0.0  # the mean deviation from that: on busy cores what it takes next is a guess
    num_probes: int = 0
    _num_asked: int = 0

    def choose(self, wish: Wish, num_bytes: int, whole: bool = True) -> Choice:
        """How so many bytes of KV had better travel."""
        if wish == "raw":
            return Choice("raw", "as configured")
        if self.shape is None or not whole:
            return Choice("raw", "these are not whole blocks of floats")
        if wish == "int8":
            return Choice("int8", "as configured")
        if num_bytes < MIN_BYTES:
            return Choice("raw", "too little to matter")
        self._num_asked += 1
        if not self.link_bytes_per_s:
            return Choice("raw", "the link is not measured yet")
        raw_s = num_bytes / self.link_bytes_per_s
        saved_s = self.saved_bytes(num_bytes) / self.link_bytes_per_s
        doubt = saved_s - num_bytes * self.codec_s_per_byte > _GAIN * raw_s  # on average it would pay
        if self.num_probes < _PROBES or self._num_asked % (_DOUBT_EVERY if doubt else _PROBE_EVERY) == 0:
            return Choice("int8", "to measure the codec")
        spent_s = num_bytes * (self.codec_s_per_byte + _CAUTION * self.codec_spread)
        rate = f"{self.link_bytes_per_s / 1e9:.3g} GB/s"
        said = f"saves {saved_s * 1e3:.3g} ms at {rate}, costs up to {spent_s * 1e3:.3g} ms"
        return Choice("int8" if saved_s - spent_s > _GAIN * raw_s else "raw", said)

    def saved_bytes(self, num_bytes: int) -> float:
        """Bytes that need not travel where so many do as int8."""
        assert self.shape is not None
        return num_bytes * (1 - self.shape.encoded_bytes / self.shape.block_bytes)

    @property
    def break_even_bytes_per_s(self) -> float:
        """The rate of a link on which both take the same time; 0 while the codec is not measured."""
        return self.saved_bytes(1) / self.codec_s_per_byte if self.codec_s_per_byte else 0.0

    def crossed(self, wire_bytes: int, wire_s: float) -> None:
        """So many bytes took the link so long."""
        if wire_bytes >= MIN_BYTES // 4 and wire_s > 0:
            self.link_bytes_per_s = _mix(self.link_bytes_per_s, wire_bytes / wire_s)

    def coded(self, num_bytes: int, codec_s: float) -> None:
        """So many bytes took so long to encode there and decode here."""
        if num_bytes >= MIN_BYTES:
            found = codec_s / num_bytes
            if self.num_probes < _PROBES:  # memory is touched for the first time: the least is believed
                self.codec_s_per_byte = min(self.codec_s_per_byte or found, found)
            else:
                self.codec_spread += _WEIGHT * (abs(found - self.codec_s_per_byte) - self.codec_spread)
                self.codec_s_per_byte = _mix(self.codec_s_per_byte, found)
            self.num_probes += 1


def _mix(old: float, new: float) -> float:
    return old + _WEIGHT * (new - old) if old else new
