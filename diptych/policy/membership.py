"""The part of the two vocabularies that says who may work with whom: connections that end, and workers that leave.

Who comes and who is gone (`WorkerUp`, `WorkerLost`, `PeerLost`) and everything else is in `messages.py`, which says
what all these classes have in common.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LinkDown:
    """A worker has lost its connection to a peer that may well live: no handover between the two for now."""

    worker: str
    peer: str


@dataclass(frozen=True, slots=True)
class LinkUp:
    """The connection that was down is there again."""

    worker: str
    peer: str


@dataclass(frozen=True, slots=True)
class LinkMeasured:
    """A worker reads a peer's KV at so many bytes per second, all told; said when it has changed."""

    worker: str
    peer: str
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Drained:
    """A worker that was told to drain holds nothing of any request any more, and nobody reads from it."""

    worker: str


@dataclass(frozen=True, slots=True)
class Drain:
    """To the router: place nothing more on this worker; what is left there after `timeout_s` goes on elsewhere.

    To the worker, once the router's books say that nothing is left there: say Drained when nothing is.
    """

    worker: str
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Dismiss:
    """This worker is to go, at once. Its driver tells it, hangs up, and says WorkerLost."""

    worker: str
