"""The router's books: what it knows of each worker and each request, and how workers are scored for one.

Nothing here is reported by workers step by step: it is what the router placed, and what it heard has finished. Not
responsible for deciding (`router.py`).
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from diptych.policy.handover import Candidate, explain
from diptych.policy.ladder import Ladder, Rung
from diptych.policy.messages import Role, Submitted, attempt_id

PolicyName = Literal["round-robin", "least-loaded", "prefix-aware"]


@dataclass(frozen=True, slots=True)
class RouterSpec:
    """policy: how workers are scored. max_requests: in flight at most; more are refused with 429.

    disaggregate_above: in a mixture, prompts with more uncached tokens than this go to a pair. max_queued_tokens: most
    prompt tokens that wait to be computed; a prompt that would exceed it, and is not alone, is refused with 429.
    """

    policy: PolicyName = "prefix-aware"
    max_requests: int = 4096
    disaggregate_above: int = 256
    max_queued_tokens: int | None = None


@dataclass(slots=True)
class WorkerView:
    """What the router knows of a worker, and has given it to do."""

    name: str
    role: Role
    num_blocks: int
    block_size: int
    token_bytes: int = 0  # KV of one token; 0: not known
    prompt_tokens: int = 0  # placed here and not prefilled yet
    held_tokens: int = 0  # at most held by what decodes here
    num_requests: int = 0
    last_placed: int = 0
    prefixes: OrderedDict[bytes, None] = field(default_factory=OrderedDict)  # hashes likely in its cache, LRU

    def fits(self, num_tokens: int) -> bool:
        """Its whole pool could hold that many tokens."""
        return -(-num_tokens // self.block_size) <= self.num_blocks

    def matched(self, hashes: tuple[bytes, ...]) -> int:
        """Tokens of the longest prefix it probably holds."""
        count = 0
        for digest in hashes:
            if digest not in self.prefixes:
                break
            count += 1
        return count * self.block_size

    def remember(self, hashes: tuple[bytes, ...]) -> None:
        """It will hold these blocks; forget as many of the oldest as it cannot hold."""
        for digest in hashes:
            self.prefixes[digest] = None
            self.prefixes.move_to_end(digest)
        while len(self.prefixes) > self.num_blocks:
            self.prefixes.popitem(last=False)


@dataclass(slots=True)
class RequestView:
    """A request in flight: where it is, and as which attempt."""

    submitted: Submitted
    order: int
    life: Ladder[Rung]
    attempt: int = 0
    prefill: str = ""  # the worker that computes the prompt; "" once that is over or for a mixed worker
    decode: str = ""  # the worker that writes the answer; "" where none is written
    keeper: str = ""  # the prefill worker that has, or had, its KV: where it would best go on
    uncached: int = 0  # prompt tokens charged to the prefilling worker until the first token
    charged: str = ""  # that worker
    failed: set[tuple[str, str]] = field(default_factory=set)  # pairs that gave it up; another one is preferred
    ranked: list[Candidate] = field(default_factory=list)  # where links counted: who decodes it, and who came next
    alone_since: float | None = None  # when its prompt was placed on a prefilling worker that had nothing else to do

    @property
    def rid(self) -> int:
        """Its present attempt."""
        return attempt_id(self.submitted.request, self.attempt)

    @property
    def why(self) -> str:
        """Why it is decoded where it is, where links counted; else ""."""
        return explain(self.ranked) if self.ranked else ""


Pair = tuple[WorkerView, WorkerView]
Score = Callable[[WorkerView, RequestView], tuple[float, ...]]


def round_robin(view: WorkerView, request: RequestView) -> tuple[float, ...]:
    """Whoever was given nothing for longest."""
    return (view.last_placed,)


def least_loaded(view: WorkerView, request: RequestView) -> tuple[float, ...]:
    """Least outstanding work: prompt tokens to compute, then share of the pool in use."""
    return (
        view.prompt_tokens + view.held_tokens / (view.num_blocks * view.block_size),
        view.num_requests,
        view.last_placed,
    )


def prefix_aware(view: WorkerView, request: RequestView) -> tuple[float, ...]:
    """Least outstanding work counting this request's own, less what the worker already holds of it."""
    mine = request.submitted.num_prompt - view.matched(request.submitted.hashes)
    return (mine + view.prompt_tokens + view.held_tokens / 16, view.num_requests, view.last_placed)


SCORES: dict[PolicyName, Score] = {
    "round-robin": round_robin,
    "least-loaded": least_loaded,
    "prefix-aware": prefix_aware,
}
