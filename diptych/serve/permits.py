"""Permits: what lets a peer read blocks of ours, for as long as the attempt they belong to is offered to it.

    permit   attempt (8 bytes), and the first 16 of HMAC-SHA256(secret, attempt)

One is made for each attempt and goes with `Publish` and `Replicate` to the peer that is to read; with each request for
blocks it comes back. The secret is of this process and never leaves it, so nobody else makes one, and none outlives it.
What an attempt offers just now only policy knows, so a permit is good from the first block that is published until
`Done`, `Drop`, the end of the lease or of the connection, for those blocks and no others.

Not responsible for bringing it to anybody (`worker.py`), nor for asking what it is good for (`transfer/serving.py`).
"""

import hmac
import secrets

from diptych.policy.worker import Worker
from diptych.transfer.seam import PERMIT_BYTES

_RID_BYTES = 8


class Permits:
    """The permits of one worker, for as long as its process lives."""

    def __init__(self, policy: Worker):
        self._policy = policy
        self._secret = secrets.token_bytes(32)

    def issue(self, rid: int) -> bytes:
        """The permit of an attempt; it says nothing by itself, and is the same each time."""
        said = rid.to_bytes(_RID_BYTES, "little")
        return said + hmac.digest(self._secret, said, "sha256")[: PERMIT_BYTES - _RID_BYTES]

    def readable(self, permit: bytes, blocks: list[int]) -> bool:
        """Whether these blocks are offered now by the attempt that the permit is of. Any thread may ask.

        The secret does not change, and policy's answer is one look at what its thread may be writing (`Source.covers`).
        """
        rid = int.from_bytes(permit[:_RID_BYTES], "little")
        if not hmac.compare_digest(permit, self.issue(rid)):
            return False
        return self._policy.source.covers(rid, blocks) or self._policy.copies.covers(rid, blocks)
