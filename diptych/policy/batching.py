"""What goes into the next step: continuous batching with one rule, "catch up on your tokens".

Decodes first (a running answer waits for nobody), then prompts, cut to the worker's token budget: a `chunk` of tokens
where it has one, whole prompts where it has not, and with an inter-token budget as many as the step-time model says
will fit. Chunks are shared: half for the oldest prompt, half for those with less left to read. A decode that needs a
block when none is left takes it from the youngest sequence, which computes its KV again later (preemption by
recompute).

Not responsible for admission (`memory.py`): whoever is in `running` has memory for every token known so far.
"""

from collections.abc import Callable
from dataclasses import dataclass

from diptych.policy.blocks import BlockPool
from diptych.policy.ladder import Rung
from diptych.policy.messages import Role, Slice
from diptych.policy.pace import StepTimes
from diptych.policy.sequence import Sequence

WHOLE_PROMPTS = 8192  # tokens of further whole prompts that may join the first one in a step
MIN_CHUNK = 16  # a prompt always gets on by this much, whatever the inter-token budget says


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """What a worker's policy knows of its worker. Role is a value here, never a subclass.

    chunk: most new tokens in a step, None for whole prompts. itl_budget_s: predicted duration a step with decodes in
    it should not exceed. depth: steps planned before the last is back. lease_s: how long a prefill side keeps KV
    nobody asks for. replicate: a decode side lets the prefill side read back each block of the answer that is full.
    """

    name: str
    role: Role
    num_blocks: int
    block_size: int = 16
    chunk: int | None = 512
    max_batch: int = 256
    itl_budget_s: float | None = None
    lease_s: float = 30.0
    depth: int = 1
    replicate: bool = True


def compose(
    running: list[Sequence],
    pool: BlockPool,
    spec: WorkerSpec,
    times: StepTimes,
    make_room: Callable[[Sequence], bool],
) -> list[Slice]:
    """The slices of the next step. `running` is sorted by age; `make_room(seq)` frees a block for it or says no."""
    slices, context = _decodes(running, pool, make_room)
    budget = _prompt_budget(spec, times, len(slices), context)
    prompts = [seq for seq in running if seq.wants and seq.behind > 0 and not seq.decodes]
    shares = _whole(prompts, budget) if spec.chunk is None else _shared(prompts, budget)
    return slices + [seq.plan(count) for seq, count in shares]


def repeats(slices: tuple[Slice, ...], seqs: dict[int, Sequence], running: list[Sequence], pool: BlockPool) -> int:
    """How many times a step may be taken in a row before any decision in it could change.

    More than one only where every running sequence decodes and has said its first token (the router waits for that
    one): until one of them ends, fills a block that is to be replicated, or the blocks they grow into run out.
    """
    members = [seqs[s.rid] for s in slices]
    num_active = sum(seq.wants or seq.inflight > 0 for seq in running)
    if num_active != len(members) or any(s.count != 1 or not s.sample for s in slices):
        return 1
    if any(seq.ended is not None or seq.life.at != Rung.DECODING for seq in members):
        return 1
    limit = 1 + min(seq.target - seq.num_tokens for seq in members)
    fills = [1 + -seq.num_computed % pool.block_size for seq in members if seq.copied is not None]
    limit = min(limit, *fills) if fills else limit

    def fits(count: int) -> bool:
        return sum(len(crossings(seq, count, pool.block_size)) for seq in members) <= pool.num_available

    if fits(limit):
        return limit
    low, high = 1, limit  # fits(low), not fits(high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def fast_forward(members: list[Sequence], count: int, pool: BlockPool) -> None:
    """Plan what `count - 1` further single steps of these decodes would have planned, block for block."""
    grown = sorted((k, i) for i, seq in enumerate(members) for k in crossings(seq, count, pool.block_size))
    for _, i in grown:
        members[i].blocks += pool.take(1)
    for seq in members:
        seq.num_computed += count - 1
        seq.num_tokens += count - 1


def crossings(seq: Sequence, count: int, block_size: int) -> range:
    """At which of `count` repetitions (the step as planned is number 0) a decode grows into a new block."""
    first = len(seq.blocks) * block_size - seq.num_computed + 1
    return range(first, count, block_size)


def _decodes(
    running: list[Sequence], pool: BlockPool, make_room: Callable[[Sequence], bool]
) -> tuple[list[Slice], int]:
    """One token for each sequence that only lacks its last one; also the context they read.

    Making room restarts younger sequences, which come later in the list and then decode no more.
    """
    slices = []
    context = 0
    for seq in list(running):
        if not seq.wants or not seq.decodes:
            continue
        if seq.num_computed == len(seq.blocks) * pool.block_size:
            if pool.num_available == 0 and not make_room(seq):
                continue
            seq.blocks += pool.take(1)
        context += seq.num_tokens
        slices.append(seq.plan(1))
    return slices, context


def _whole(prompts: list[Sequence], budget: int) -> list[tuple[Sequence, int]]:
    """Whole prompts, oldest first: the first in any case, others while they fit beside it."""
    shares: list[tuple[Sequence, int]] = []
    for seq in prompts:
        if shares and seq.behind > budget:
            break
        shares.append((seq, seq.behind))
        budget -= seq.behind
    return shares


def _shared(prompts: list[Sequence], budget: int) -> list[tuple[Sequence, int]]:
    """Chunks of prompts: the oldest shares its chunk, half and half, with those that have less left than itself.

    So a short prompt does not wait until a long one before it is read, and the long one takes at most twice as long.
    What the oldest does not need goes to whoever has least left.
    """
    if not prompts:
        return []
    oldest, *others = prompts
    shorter = sum(seq.behind for seq in others if seq.behind < oldest.behind)
    first = min(oldest.behind, budget - min(budget // 2, shorter))
    shares = [(oldest, first)]
    left = budget - first
    for seq in sorted(others, key=lambda seq: (seq.key[0], seq.behind, seq.key)):
        if left <= 0:
            break
        shares.append((seq, min(seq.behind, left)))
        left -= seq.behind
    return shares


def _prompt_budget(spec: WorkerSpec, times: StepTimes, num_decodes: int, context: int) -> int:
    """New prompt tokens that may join `num_decodes` decodes reading `context` tokens."""
    budget = WHOLE_PROMPTS if spec.chunk is None else max(spec.chunk - num_decodes, min(MIN_CHUNK, spec.chunk))
    if spec.itl_budget_s is not None and num_decodes:
        budget = min(budget, max(times.room(spec.itl_budget_s, num_decodes, context), MIN_CHUNK))
    return budget
