"""A request as one worker sees it: how many tokens it has, how many are computed, which blocks hold them.

There is one rule for prompts, decodes and recomputation alike: a sequence has *tokens to catch up on*.

    0 ................ num_computed .......... num_tokens ............. target
      KV written or planned      to catch up on        may still be written here

Not responsible for when it runs (`batching.py`) or where its KV goes (`source.py`, `sink.py`).
"""

from diptych.policy.ladder import REQUEST, Ladder, Rung
from diptych.policy.messages import Place, Reason, Role, Slice


class Sequence:
    """One attempt at a request on one worker."""

    __slots__ = (
        "admit", "blocks", "computed", "copied", "emitted", "ended", "hashes", "inflight", "keeper", "key", "life",
        "max_new", "num_computed", "num_tokens", "part", "peer", "rid", "sealed", "shown", "target", "tight",
    )  # fmt: skip

    def __init__(self, place: Place, now: float):
        self.rid = place.rid
        self.part = place.part
        self.peer = place.peer
        self.key = (place.priority, place.order)
        self.num_tokens = place.num_tokens
        end = place.num_prompt + place.max_new
        self.target = place.num_tokens + 1 if place.part == Role.PREFILL else end
        self.max_new = place.max_new
        self.emitted = place.num_tokens - place.num_prompt  # tokens of the answer written so far
        self.hashes = list(place.hashes)
        self.num_computed = 0  # tokens whose KV is written or will be when the steps in flight are done
        self.computed = 0  # the same, counting only steps that are done
        self.blocks: list[int] = []
        self.shown = 0  # blocks the executor was told of
        self.admit = True  # the executor's table must start anew
        self.sealed = 0  # leading blocks whose hash was made known
        self.inflight = 0  # steps that carry it and are not back
        self.ended: Reason | None = None  # why it stops; it is let go when nothing of it is in flight
        self.keeper = ""  # the peer that keeps its KV in case this worker dies
        self.copied: int | None = None  # leading blocks the keeper has, or was offered; None: it wants no more
        self.tight = -1  # blocks available when it last did not fit; not tried again below that
        rung = Rung.HANDOVER if place.part == Role.DECODE else Rung.QUEUED
        self.life = Ladder(REQUEST, Rung.QUEUED, now)
        self.life.climb(rung, now)

    @property
    def behind(self) -> int:
        """Tokens to catch up on."""
        return self.num_tokens - self.num_computed

    @property
    def wants(self) -> bool:
        """There is something to compute for it: it goes on, and may still write a token here."""
        return self.ended is None and self.num_tokens < self.target

    @property
    def offers(self) -> bool:
        """Its KV is for a peer. The prefill part of a request that writes nothing is for nobody."""
        return self.part == Role.PREFILL and self.peer != ""

    @property
    def decodes(self) -> bool:
        """It only lacks its last token: what is left is one token a step."""
        return self.num_tokens - self.num_computed == 1 and self.num_computed > 0

    def plan(self, count: int) -> Slice:
        """Put `count` tokens into the step being composed; the token they yield counts as known from here on."""
        start = self.num_computed
        self.num_computed += count
        sample = self.num_computed == self.num_tokens
        self.num_tokens += sample
        self.inflight += 1
        fresh = tuple(self.blocks[self.shown :])
        self.shown = len(self.blocks)
        admit, self.admit = self.admit, False
        return Slice(self.rid, start, count, fresh, sample, admit)

    def arrived(self) -> None:
        """All its KV came from the prefill side, and with it the first token."""
        self.num_computed = self.computed = self.num_tokens
        self.num_tokens += 1
        self.emitted += 1

    def restart(self) -> None:
        """Its KV is gone: everything known is to be computed again."""
        self.blocks = []
        self.shown = self.num_computed = self.computed = self.sealed = 0
        self.admit = True
        self.tight = -1


def age(seq: Sequence) -> tuple[int, int]:
    """What everyone is sorted by: lower goes first."""
    return seq.key
