"""What a worker's driver keeps of each attempt at a request, and policy must not see. Not responsible for using it."""

from array import array
from dataclasses import dataclass, field

from diptych.engine.executor import Score
from diptych.errors import ProtocolError
from diptych.policy.hashes import HASH_BYTES, chain
from diptych.policy.messages import Publish
from diptych.policy.retention import Replicate
from diptych.serve.wire import check_ids, unpack_offered, unpack_published
from diptych.transfer.seam import NO_PERMIT

MAX_BLOCKS = 1 << 31  # of a pool: they are counted in int32


@dataclass(slots=True)
class Held:
    """What the driver remembers of one attempt at a request."""

    tokens: "array[int]"
    num_prompt: int
    hashed: int  # leading full blocks whose hash policy knows
    parent: bytes  # the hash of the last of them
    expects: str  # the peer its KV comes from, until the last of it is published
    checksums: "array[int]"  # of the peer's published blocks, in order
    computes: bool  # its prompt is computed here
    num_known: int  # tokens when it was placed here
    permit: bytes = NO_PERMIT  # to read them
    started: bool = False
    cached: int = 0
    again: tuple[int, int] | None = None  # tokens of prompt and answer that it had to compute again; until emitted
    scores: dict[int, Score] = field(default_factory=dict)  # of tokens not emitted yet, by position
    prompt_scores: list[Score] = field(default_factory=list)  # until the first token is emitted
    vector: bytes = b""  # what came of a prompt after which nothing is written
    codec: str = ""  # how the last of its KV that was read here travelled
    why: str = ""  # and why so
    name: str = ""  # what log lines call its request

    def fill(self, num_computed: int, block_size: int) -> list[bytes]:
        """Hashes of the blocks that are full once so many tokens are computed, but for those known already."""
        filled = []
        while (self.hashed + 1) * block_size <= num_computed:
            start = self.hashed * block_size
            self.parent = chain(self.parent, self.tokens[start : start + block_size])
            self.hashed += 1
            filled.append(self.parent)
        return filled

    def note_resumed(self, start: int, resumed: dict[str, int]) -> None:
        """Count what an attempt that goes on elsewhere has to compute again. The last token is always computed."""
        prompt = max(self.num_prompt - start, 0)
        written = max(self.num_known - 1 - max(start, self.num_prompt), 0)
        if self.num_known > self.num_prompt and (self.computes or prompt or written):
            self.again = (prompt, written)
            resumed["requests"] += 1
            resumed["prompt_tokens"] += prompt
            resumed["written_tokens"] += written


def check_blocks(blocks: tuple[int, ...]) -> None:
    """Indices as a plan takes them; whether a pool has them is seen before a byte moves."""
    if max(blocks, default=0) >= MAX_BLOCKS:
        raise ProtocolError(f"block {max(blocks)} is in no pool")


def check_published(event: Publish, attachment: bytes, vocab_size: int) -> None:
    """A permit, and a checksum for each block; with the last of them the first token."""
    check_blocks(event.blocks)
    _, _, first = unpack_published(attachment, len(event.blocks))
    check_ids(first, vocab_size)
    if len(first) != event.final:
        raise ProtocolError(f"{len(first)} tokens with a Publish whose 'final' is {event.final}")


def check_replicated(event: Replicate, attachment: bytes) -> None:
    """A permit, and a hash and a checksum for each block."""
    if [len(digest) for digest in event.hashes] != [HASH_BYTES] * len(event.blocks):
        raise ProtocolError(f"{len(event.blocks)} blocks, and not as many hashes")
    check_blocks(event.blocks)
    unpack_offered(attachment, len(event.blocks))
