"""What one worker has read from its peers since it started: for people to see, and for what the router counts.

Not responsible for single requests (`account.py`), nor for anything that policy decides by.
"""

from dataclasses import dataclass, field
from typing import Any

from diptych.policy.messages import Read
from diptych.transfer.seam import Stats


@dataclass(slots=True)
class Traffic:
    """Counts. `links`: the last read from each peer that is still there; `codecs`: reads by codec."""

    num_bytes: int = 0  # of KV
    num_wire_bytes: int = 0  # the same as it travelled
    num_transfers: int = 0
    num_failed: int = 0
    seconds: float = 0.0
    codecs: dict[str, int] = field(default_factory=dict)
    links: dict[str, dict[str, Any]] = field(default_factory=dict)

    def read(self, event: Read) -> None:
        """A read is over and verified."""
        self.num_transfers += 1
        self.num_bytes += event.num_bytes
        self.seconds += event.elapsed_s

    def travelled(self, peer: str, stats: Stats) -> None:
        """How it came."""
        self.num_wire_bytes += stats.wire_bytes or stats.num_bytes
        self.codecs[stats.codec] = self.codecs.get(stats.codec, 0) + 1
        bytes_per_s = round(stats.num_bytes / stats.elapsed_s) if stats.elapsed_s else 0
        self.links[peer] = {"codec": stats.codec, "why": stats.why, "bytes_per_s": bytes_per_s}

    def state(self) -> dict[str, Any]:
        """As it is shown."""
        return {
            "bytes": self.num_bytes,
            "seconds": self.seconds,
            "transfers": self.num_transfers,
            "failed": self.num_failed,
            "wire_bytes": self.num_wire_bytes,
            "codecs": self.codecs,
            "links": self.links,
        }
