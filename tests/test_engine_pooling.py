"""One vector of many hidden states, however the prompt was cut."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from diptych.engine.executor import Sampling  # noqa: E402
from diptych.engine.pooling import pool  # noqa: E402
from diptych.engine.sequence import Piece, Sequence  # noqa: E402

TABLE = np.zeros(1, np.int32)


def pooled(states, pooling, cuts):
    """What comes of a prompt's hidden states in pieces; all but the last give nothing."""
    sequence = Sequence([0] * len(states), len(states), Sampling(pooling=pooling))
    *before, last = [
        pool(Piece(1, sequence, start, end - start, TABLE, end == len(states)), states[start:end])
        for start, end in zip(cuts, cuts[1:], strict=False)
    ]
    assert before == [None] * len(before)
    return last


@pytest.mark.parametrize("cuts", [[0, 40], [0, 1, 2, 40], [0, 16, 32, 39, 40]])
def test_the_cuts_do_not_matter(cuts):
    states = torch.randn(40, 8, generator=torch.manual_seed(1))
    assert torch.equal(pooled(states, "last", cuts), states[-1])
    assert torch.equal(pooled(states, "labels", cuts), states[-1])
    assert torch.allclose(pooled(states, "mean", cuts), states.mean(0), atol=1e-6)


def test_a_mean_of_half_precision_is_summed_in_float32():
    states = torch.full((4096, 4), 1.0, dtype=torch.bfloat16)
    assert pooled(states, "mean", [0, 2048, 4096]).tolist() == [1.0] * 4


@pytest.mark.parametrize("again", [0, 3, 5, 6])
def test_a_mean_counts_what_is_computed_again_once(again):
    """After a preemption a prompt goes on from its start, or from those of its blocks that are still cached."""
    states = torch.randn(8, 4, generator=torch.manual_seed(2))
    sequence = Sequence([0] * 8, 8, Sampling(pooling="mean"))
    for start, end in ((0, 6), (again, again + 1), (again + 1, 8)):
        vector = pool(Piece(1, sequence, start, end - start, TABLE, end == 8), states[start:end])
    assert torch.allclose(vector, states.mean(0), atol=1e-6)


def test_a_mean_of_a_prompt_whose_beginning_was_found_is_refused():
    sequence = Sequence([0] * 8, 8, Sampling(pooling="mean"))
    with pytest.raises(RuntimeError, match="first 4 tokens were found"):
        pool(Piece(1, sequence, 4, 4, TABLE, True), torch.ones(4, 2))
