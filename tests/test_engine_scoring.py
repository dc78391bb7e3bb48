"""Log-probabilities: those of the model, in the order of their size, whoever else is in the batch."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from diptych.engine.scoring import cut, scores  # noqa: E402

torch.set_num_threads(1)


def read(score):
    return np.frombuffer(score.ids, np.int32).tolist(), np.frombuffer(score.values, np.float32)


@pytest.mark.parametrize("num_top", [0, 1, 5])
def test_the_token_first_then_the_most_likely(num_top):
    logits = torch.randn(150, 40, generator=torch.Generator().manual_seed(1))
    tokens = [i % 40 for i in range(150)]
    expected = logits.log_softmax(-1)
    for row, score in enumerate(scores(logits, tokens, num_top)):
        ids, values = read(score)
        best = sorted(range(40), key=lambda t: -float(expected[row, t]))
        assert ids == [tokens[row], *best[:num_top]]
        assert values == pytest.approx([float(expected[row, t]) for t in ids], abs=1e-6)
        assert score.rank == 1 + best.index(tokens[row])


def test_fewer_alternatives_are_the_first_of_more():
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(2))
    (many,), (few,) = scores(logits, [3], 10), scores(logits, [3], 2)
    assert cut(many, 2) == few


def test_a_small_vocabulary_has_no_more_than_it_has():
    (score,) = scores(torch.zeros(1, 3), [1], 20)
    assert len(read(score)[0]) == 4
