"""What goes into a step: decodes first, prompts cut to the budget, blocks taken from the youngest."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.policy.batching import MIN_CHUNK, WHOLE_PROMPTS, WorkerSpec, compose, crossings, repeats
from diptych.policy.blocks import BlockPool
from diptych.policy.ladder import Rung
from diptych.policy.messages import Place, Role
from diptych.policy.pace import StepTimes
from diptych.policy.sequence import Sequence

SPEC = WorkerSpec("w", Role.MIXED, num_blocks=64, block_size=4, chunk=8)


def never(seq: Sequence) -> bool:
    return False


def sequence(
    rid: int, num_prompt: int, computed: int = 0, max_new: int = 10, pool: BlockPool | None = None
) -> Sequence:
    """A sequence with memory for all its tokens, `computed` of which have their KV."""
    seq = Sequence(Place("w", rid, Role.MIXED, "", num_prompt, num_prompt, max_new, (), 0, rid), 0.0)
    seq.num_computed = seq.computed = computed
    if computed:
        seq.life.climb(Rung.DECODING, 0.0)
    if pool is not None:
        seq.blocks = pool.take(pool.blocks_for(num_prompt))
    return seq


def plan(
    *seqs: Sequence,
    spec: WorkerSpec = SPEC,
    pool: BlockPool | None = None,
    make_room: Callable[[Sequence], bool] = never,
) -> list[tuple[int, int, int, bool]]:
    slices = compose(list(seqs), pool or BlockPool(64, 4), spec, StepTimes(), make_room)
    return [(s.rid, s.start, s.count, s.sample) for s in slices]


def test_decodes_come_first_and_the_oldest_prompt_gets_the_rest() -> None:
    pool = BlockPool(64, 4)
    seqs = [sequence(1, 20, pool=pool), sequence(2, 6, 5, pool=pool), sequence(3, 30, pool=pool)]
    assert plan(*seqs, pool=pool) == [(2, 5, 1, True), (1, 0, 8, False)]
    assert plan(*seqs, pool=pool) == [(2, 6, 1, True), (1, 8, 8, False)]


def test_a_short_prompt_does_not_wait_until_a_long_one_is_read() -> None:
    seqs = [sequence(1, 100), sequence(2, 200), sequence(3, 5)]
    assert plan(*seqs) == [(1, 0, 4, False), (3, 0, 4, False)]
    assert plan(*seqs) == [(3, 4, 1, True), (1, 4, 8, False)]


def test_small_prompts_share_a_step_up_to_the_chunk() -> None:
    assert plan(sequence(1, 3), sequence(2, 2), sequence(3, 9)) == [(1, 0, 3, True), (2, 0, 2, True), (3, 0, 3, False)]


def test_whole_prompts_go_whole_even_beyond_the_limit_but_only_the_first() -> None:
    spec = WorkerSpec("w", Role.MIXED, num_blocks=64, block_size=4, chunk=None)
    assert plan(sequence(1, 3 * WHOLE_PROMPTS), sequence(2, 5), spec=spec) == [(1, 0, 3 * WHOLE_PROMPTS, True)]
    assert plan(sequence(1, 5), sequence(2, 3 * WHOLE_PROMPTS), spec=spec) == [(1, 0, 5, True)]


def test_with_an_inter_token_budget_the_chunk_is_cut_to_what_fits() -> None:
    times = StepTimes()
    for i in range(50):
        times.observe(i % 20 + 1, 100 * (i % 7), 0.01 + 0.001 * (i % 20 + 1))
    spec = WorkerSpec("w", Role.MIXED, num_blocks=64, block_size=4, chunk=512, itl_budget_s=0.05)
    pool = BlockPool(200, 4)
    seqs = [sequence(1, 6, 5, pool=pool), sequence(2, 400, pool=pool)]
    decode, prompt = compose(seqs, pool, spec, times, never)
    assert decode.rid == 1 and MIN_CHUNK < prompt.count < 45
    alone = compose(seqs[1:], pool, spec, times, never)
    assert alone[0].count > 300, "without a decode beside it nobody waits"


def test_a_decode_takes_a_block_when_it_crosses_into_one() -> None:
    pool = BlockPool(3, 4)
    seq = sequence(1, 4, pool=pool)
    seq.num_computed = seq.computed = 4
    seq.num_tokens = 5
    (piece,) = compose([seq], pool, SPEC, StepTimes(), never)
    assert len(seq.blocks) == 2 and piece.blocks == tuple(seq.blocks) and piece.admit


def test_without_a_block_it_asks_for_room_and_waits_if_there_is_none() -> None:
    pool = BlockPool(1, 4)
    seq = sequence(1, 4, pool=pool)
    seq.num_computed = seq.computed = 4
    seq.num_tokens = 5
    asked: list[int] = []
    assert compose([seq], pool, SPEC, StepTimes(), lambda s: bool(asked.append(s.rid))) == []
    assert asked == [1]


@given(
    behind=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    decodes=st.integers(0, 6),
    chunk=st.integers(1, 40),
)
def test_a_step_never_exceeds_its_chunk_and_never_skips_a_decode(behind: list[int], decodes: int, chunk: int) -> None:
    pool = BlockPool(400, 4)
    spec = WorkerSpec("w", Role.MIXED, num_blocks=400, block_size=4, chunk=chunk)
    running = [sequence(i, 6, 5, pool=pool) for i in range(decodes)]
    prompts = [sequence(100 + i, n, pool=pool) for i, n in enumerate(behind)]
    slices = compose(running + prompts, pool, spec, StepTimes(), never)
    assert [s.rid for s in slices[:decodes]] == list(range(decodes))
    rest = sum(s.count for s in slices[decodes:])
    assert rest <= max(chunk - decodes, min(MIN_CHUNK, chunk))
    assert rest >= min(sum(behind), max(chunk - decodes, min(MIN_CHUNK, chunk))), "all the budget is used"
    assert slices[decodes].rid == 100, "the oldest is always read on"
    others = [behind[s.rid - 100] for s in slices[decodes + 1 :]]
    assert others == sorted(others), "then whoever has least left"


@pytest.mark.parametrize("num_blocks, expected", [(100, 5), (4, 5), (3, 2), (2, 1)])
def test_a_decode_step_repeats_until_an_end_or_the_blocks(num_blocks: int, expected: int) -> None:
    pool = BlockPool(num_blocks, 4)
    first, second = sequence(1, 4, 3, max_new=5, pool=pool), sequence(2, 3, 2, max_new=50, pool=pool)
    slices = tuple(compose([first, second], pool, SPEC, StepTimes(), never))
    assert repeats(slices, {1: first, 2: second}, [first, second], pool) == expected


def test_a_step_with_a_prompt_or_an_ended_sequence_does_not_repeat() -> None:
    pool = BlockPool(100, 4)
    decode, prompt = sequence(1, 4, 3, pool=pool), sequence(2, 9, pool=pool)
    slices = tuple(compose([decode, prompt], pool, SPEC, StepTimes(), never))
    assert repeats(slices, {1: decode, 2: prompt}, [decode, prompt], pool) == 1
    first_token = sequence(3, 4, pool=pool)
    first_token.num_computed = 3  # a cached prefix: one token of the prompt is left, and the router waits for the first
    (piece,) = compose([first_token], pool, SPEC, StepTimes(), never)
    assert repeats((piece,), {3: first_token}, [first_token], pool) == 1


@given(computed=st.integers(1, 20), count=st.integers(1, 30), size=st.integers(1, 8))
def test_crossings_are_where_single_steps_would_take_a_block(computed: int, count: int, size: int) -> None:
    pool = BlockPool(100, size)
    seq = sequence(1, computed + 1, computed, max_new=99)
    seq.blocks = pool.take(pool.blocks_for(computed + 1))
    seq.plan(1)
    predicted = list(crossings(seq, count, size))
    taken = []
    for step in range(1, count):
        if seq.num_computed == len(seq.blocks) * size:
            taken.append(step)
            seq.blocks += pool.take(1)
        seq.plan(1)
    assert predicted == taken
