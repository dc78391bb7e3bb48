"""What a decode side and a prefill side say to each other so that a death costs no prompt: part of `messages.py`.

Not responsible for what they do (`copies.py`, `keep.py`).
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Replicate:
    """Decode side: these blocks of the answer are full; read them, so that they outlive me.

    They are blocks `first` and following of the sequence. The driver adds their checksums.
    """

    peer: str
    rid: int
    first: int
    blocks: tuple[int, ...]
    hashes: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Replicated:
    """Prefill side: I have the leading `num_blocks` blocks of the sequence. (`Drop`: I want no more.)"""

    peer: str
    rid: int
    num_blocks: int


@dataclass(frozen=True, slots=True)
class Release:
    """Decode side: it is over, so nothing of it need be kept."""

    peer: str
    rid: int
