"""What came with the words of peers before policy had a use for it: permits, checksums, first tokens.

Policy decides how long it is kept, and says so by what it orders: a `Place` claims what was published too early, a
`Pull` takes what is to be replicated, `Drop` says that there will be neither. So nothing is forgotten here that policy
still counts on, and nothing stays. Not responsible for checking it (`held.py`).
"""

from diptych.errors import ProtocolError
from diptych.policy.messages import Publish
from diptych.policy.retention import Replicate
from diptych.serve.wire import unpack_offered
from diptych.transfer.seam import NO_PERMIT

MAX_PARTS = 1024  # of one attempt that is not here yet


class Attached:
    """The attachments of one worker's peers."""

    def __init__(self) -> None:
        self._early: dict[int, list[tuple[Publish, bytes]]] = {}  # what came before its Place
        self._copies: dict[tuple[str, int], dict[int, tuple[bytes, int]]] = {}  # block -> permit, checksum

    def __len__(self) -> int:
        return len(self._early) + len(self._copies)

    def expect_part(self, rid: int) -> None:
        """Raises ProtocolError where no further part of an attempt that is not here will be kept."""
        if len(self._early.get(rid, ())) >= MAX_PARTS:
            raise ProtocolError(f"attempt {rid} is not here, and {MAX_PARTS} parts of it are known")

    def published(self, event: Publish, attachment: bytes) -> None:
        """A part of an attempt that is not here yet."""
        self._early.setdefault(event.rid, []).append((event, attachment))

    def claim(self, rid: int) -> list[tuple[Publish, bytes]]:
        """What was published of an attempt that has come now, or never will."""
        return self._early.pop(rid, [])

    def replicated(self, event: Replicate, attachment: bytes) -> None:
        """A peer lets us read these blocks."""
        permit, sums = unpack_offered(attachment, len(event.blocks))
        known = self._copies.setdefault((event.peer, event.rid), {})
        known |= {block: (permit, checksum) for block, checksum in zip(event.blocks, sums, strict=True)}

    def take(self, peer: str, rid: int, blocks: tuple[int, ...]) -> tuple[bytes, list[int]]:
        """The permit for blocks that are to be replicated, and their checksums.

        A block that is named twice, as no peer does that knows its own, has neither the second time: it will not match.
        """
        known = self._copies.get((peer, rid), {})
        found = [known.pop(block, (NO_PERMIT, 0)) for block in blocks]
        if not known:
            self._copies.pop((peer, rid), None)
        return found[0][0], [checksum for _, checksum in found]

    def dropped(self, peer: str, rid: int) -> None:
        """We have told a peer that we read no more of an attempt."""
        left = [part for part in self._early.pop(rid, ()) if part[0].peer != peer]
        if left:
            self._early[rid] = left
        self._copies.pop((peer, rid), None)

    def forget_peer(self, peer: str) -> None:
        """A peer is gone: nothing of it will be replicated."""
        self._copies = {(name, rid): known for (name, rid), known in self._copies.items() if name != peer}
