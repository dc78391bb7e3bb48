"""What a handover costs, and between whom: rates as workers measured them, and what the router makes of them.

A worker's `Meter` keeps the rate of its reads from each peer and says so when it has changed. The router's `Handovers`
predicts from that how long a prompt's KV would be on its way, and weighs it against work: a second of transfer costs
as much as the prompt tokens that a prefill worker computes in a second. A link that nobody measured counts as fast.

Not responsible for who can reach whom (`links.py`), nor for picking (`router.py`).
"""

from dataclasses import dataclass

from diptych.policy.membership import LinkMeasured

MIN_BYTES = 256 << 10  # of a read; a smaller one says more about latency than about the link
CHANGE = 0.2  # of a rate, that is worth a message
AGAIN_S = 1.0  # between two messages about one link
WEIGHT = 0.25  # of the newest measurement
MIN_TOKENS = 64  # computed in a prefill that tells the pace
NEGLIGIBLE = 16.0  # prompt tokens: what differs by less is not worth choosing for


@dataclass(slots=True)
class _Link:
    rate: float
    said: float = 0.0
    said_at: float = 0.0


class Meter:
    """How fast one worker's reads come, by peer."""

    def __init__(self, worker: str):
        self._worker = worker
        self._links: dict[str, _Link] = {}

    def read(self, now: float, peer: str, num_bytes: int, elapsed_s: float) -> list[LinkMeasured]:
        """A read is over; returns what the router should know now."""
        if num_bytes < MIN_BYTES or elapsed_s <= 0:
            return []
        found = num_bytes / elapsed_s
        link = self._links.setdefault(peer, _Link(found))
        link.rate += WEIGHT * (found - link.rate)
        if abs(link.rate - link.said) <= CHANGE * link.said or (link.said and now < link.said_at + AGAIN_S):
            return []
        link.said, link.said_at = link.rate, now
        return [LinkMeasured(self._worker, peer, link.rate)]

    def forget(self, peer: str) -> None:
        """The connection ended; the next one may be another link."""
        self._links.pop(peer, None)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A decode worker as it was weighed for a request; `load` and `detour` are in prompt tokens."""

    worker: str
    load: float
    detour: float
    handover_s: float

    def show(self) -> str:
        """In words."""
        return f"{self.worker} (load {self.load:.0f} + handover {self.detour:.0f}: {self.handover_s * 1e3:.3g} ms)"


def explain(ranked: list[Candidate]) -> str:
    """Why the first of them was taken."""
    best, *others = [candidate.show() for candidate in ranked]
    return f"{best} before {others[0]}" if others else best


class Handovers:
    """The router's view of all links."""

    def __init__(self) -> None:
        self.tokens_per_s = 0.0  # at which prompts are computed; 0: not known yet
        self._rates: dict[str, dict[str, float]] = {}  # by target, then by source
        self._fastest: dict[str, float] = {}

    def measured(self, event: LinkMeasured) -> None:
        """A worker says how fast it reads from a peer."""
        if event.bytes_per_s > 0:
            self._rates.setdefault(event.worker, {})[event.peer] = event.bytes_per_s
            self._fastest[event.worker] = max(self._rates[event.worker].values())

    def forget(self, worker: str) -> None:
        """A worker is gone: whoever comes back under its name may be elsewhere."""
        self._rates.pop(worker, None)
        for target, rates in list(self._rates.items()):
            if rates.pop(worker, None) is not None and not rates:
                del self._rates[target]
        self._fastest = {target: max(rates.values()) for target, rates in self._rates.items()}

    def computed(self, num_tokens: int, elapsed_s: float) -> None:
        """A worker that had nothing else to do computed so much of a prompt in so long."""
        if num_tokens >= MIN_TOKENS and elapsed_s > 0:
            found = num_tokens / elapsed_s
            self.tokens_per_s += (WEIGHT if self.tokens_per_s else 1.0) * (found - self.tokens_per_s)

    def known(self) -> bool:
        """There is something to weigh."""
        return bool(self._rates) and self.tokens_per_s > 0

    def seconds(self, num_bytes: int, source: str, target: str) -> float:
        """How long so many bytes would be on their way; 0 where nobody measured."""
        rate = self._rates.get(target, {}).get(source)
        return num_bytes / rate if rate else 0.0

    def least_seconds(self, num_bytes: int, target: str, num_sources: int) -> float:
        """The same from whatever source is best for that target, if that many could be it."""
        if len(self._rates.get(target, ())) < num_sources:
            return 0.0
        return num_bytes / self._fastest[target]

    def detour(self, seconds: float) -> float:
        """Seconds on the way, as the prompt tokens that could be computed meanwhile."""
        tokens = seconds * self.tokens_per_s
        return tokens if tokens >= NEGLIGIBLE else 0.0
