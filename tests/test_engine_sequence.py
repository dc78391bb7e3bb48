"""What executors keep of sequences: tokens, block tables as deltas, the stop test, and the order of steps."""

import pytest

from diptych.engine.executor import Result, Sampling
from diptych.engine.sequence import BlockTable, InOrder, Launch, Sequence, SequenceTable
from diptych.policy.messages import Run, Slice


def table_of(tokens, block_size=4):
    table = SequenceTable(block_size)
    table.admit(1, tokens, len(tokens), Sampling())
    return table


def test_block_tables_grow_and_views_of_them_stay():
    table = BlockTable()
    views = []
    for n in range(100):
        table.append((n, 1000 + n))
        views.append(table.prefix(len(table)))
    assert len(table) == 200
    for n, view in enumerate(views):
        assert view.tolist() == [x for m in range(n + 1) for x in (m, 1000 + m)]


def test_slices_add_blocks_and_admit_starts_anew():
    table = table_of(list(range(20)))
    (first,) = table.take(Run(1, (Slice(1, 0, 7, (9, 8), admit=True),)))
    (second,) = table.take(Run(2, (Slice(1, 7, 6, (5, 4)),)))
    (again,) = table.take(Run(3, (Slice(1, 0, 8, (3, 2), admit=True),)))
    assert (first.blocks.tolist(), second.blocks.tolist(), again.blocks.tolist()) == ([9, 8], [9, 8, 5, 4], [3, 2])
    assert second.token_ids() == [7, 8, 9, 10, 11, 12] and again.sequence.num_computed == 8


def test_a_step_in_flight_survives_forget_and_readmission():
    table = table_of(list(range(8)))
    (piece,) = table.take(Run(1, (Slice(1, 0, 8, (7, 6), sample=True, admit=True),)))
    table.forget(1)
    table.forget(1)
    assert piece.token_ids() == list(range(8)) and len(table) == 0
    table.admit(1, [5], 1, Sampling())
    assert table.tokens(1) == [5] and piece.blocks.tolist() == [7, 6]


def test_extend_and_truncate():
    table = table_of([1, 2, 3])
    table.extend(1, [4, 5])
    table.take(Run(1, (Slice(1, 0, 5, (0, 1), admit=True),)))
    table.truncate(1, 4)
    assert table.tokens(1) == [1, 2, 3, 4]
    (piece,) = table.take(Run(2, (Slice(1, 3, 1),)))
    assert piece.token_ids() == [4] and piece.blocks.tolist() == [0]


@pytest.mark.parametrize(
    ("min_new", "ends"), [(0, [False, True, True]), (2, [False, True, True]), (3, [False, False, True])]
)
def test_stop_ids_end_a_sequence_once_enough_was_written(min_new, ends):
    sequence = Sequence([1, 2], 2, Sampling(stop_ids=(7, 8), min_new=min_new))
    assert [sequence.append_sampled(token) for token in (5, 7, 8)] == ends


def test_missing_blocks_and_missing_tokens_are_said():
    table = table_of([1, 2, 3])
    with pytest.raises(RuntimeError, match="sequence 1: step needs 2 blocks, its table has 1"):
        table.take(Run(1, (Slice(1, 0, 5, (0,), admit=True),)))
    (piece,) = table.take(Run(1, (Slice(1, 0, 4, (0,), admit=True),)))
    with pytest.raises(RuntimeError, match="step needs token 3, but only 3 are known"):
        piece.token_ids()


def test_steps_are_computed_in_the_order_of_their_launch():
    computed = []
    steps = InOrder(lambda launch: computed.append(launch.begin_s) or Result([(int(launch.begin_s), 0, False)]))
    flying = [steps.add(Launch([], float(n))) for n in range(3)]
    assert steps.finish(flying[1]).tokens == [(1, 0, False)] and computed == [0.0, 1.0]
    assert steps.finish(flying[0]).tokens == [(0, 0, False)] and computed == [0.0, 1.0]
    assert steps.finish(flying[2]).tokens == [(2, 0, False)]
