"""Bias and penalties: against transformers and dumb loops, row by row, and nothing where nothing was asked for."""

import random

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from transformers import RepetitionPenaltyLogitsProcessor  # noqa: E402

from diptych.engine.executor import Sampling  # noqa: E402
from diptych.engine.shaping import shaped  # noqa: E402

torch.set_num_threads(1)
VOCAB = 60


def logits(rows, seed=0):
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def history(rng, num_prompt=8, num_new=12):
    return [rng.randrange(VOCAB) for _ in range(num_prompt + num_new)], num_prompt


def test_rows_that_ask_for_nothing_are_not_even_copied():
    row = logits(2)
    hows = [Sampling(), Sampling(temperature=1.0, top_k=3, top_p=0.5, min_p=0.1)]
    assert shaped(row, hows, [([1], 1)] * 2) is row


@pytest.mark.parametrize("penalty", [0.5, 1.3, 10.0])
def test_repetition_is_that_of_transformers(penalty):
    tokens, num_prompt = history(random.Random(1))
    row = logits(1)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([tokens]), row.clone())
    assert torch.equal(shaped(row, [Sampling(repetition_penalty=penalty)], [(tokens, num_prompt)]), expected)


def test_presence_and_frequency_count_the_answer_alone():
    row = logits(1)
    tokens = [5, 5, 6, 7, 7, 7, 8]  # the first three are the prompt
    out = shaped(row, [Sampling(presence_penalty=0.5, frequency_penalty=0.25)], [(tokens, 3)])
    expected = row.clone()
    expected[0, 7] -= 0.5 + 3 * 0.25
    expected[0, 8] -= 0.5 + 0.25
    assert torch.allclose(out, expected)
    assert out[0, 5] == row[0, 5]


def test_bias_is_added():
    row = logits(1)
    out = shaped(row, [Sampling(logit_bias=((3, 100.0), (4, -100.0)))], [([1], 1)])
    assert out.argmax() == 3
    assert out.argmin() == 4
    assert (out != row).sum() == 2


def test_a_row_does_not_know_its_batch():
    rng = random.Random(2)
    hows = [
        Sampling(
            repetition_penalty=rng.choice([1.0, 1.2]),
            presence_penalty=rng.choice([0.0, 0.7]),
            frequency_penalty=rng.choice([0.0, -0.3]),
            logit_bias=rng.choice([(), ((1, 2.0), (9, -1.0))]),
        )
        for _ in range(16)
    ]
    histories = [history(rng, num_new=rng.randrange(12)) for _ in hows]
    rows = logits(16)
    together = shaped(rows, hows, histories)
    for i in range(16):
        assert torch.equal(together[i], shaped(rows[i : i + 1], [hows[i]], [histories[i]])[0])


def test_what_came_in_stays_as_it_was():
    row = logits(1)
    before = row.clone()
    shaped(row, [Sampling(repetition_penalty=2.0)], [([1, 2, 3], 1)])
    assert torch.equal(row, before)


def test_half_precision_is_shaped_in_single():
    row = logits(1).to(torch.bfloat16)
    out = shaped(row, [Sampling(frequency_penalty=0.001)], [([1, 2], 1)])
    assert out.dtype == torch.float32
    assert out[0, 2] == row[0, 2].float() - torch.tensor(0.001)


def test_no_stop_token_before_its_time():
    row = logits(1)
    how = Sampling(stop_ids=(3, 4), min_new=2)
    for num_new, held in ((0, True), (1, True), (2, False)):
        out = shaped(row, [how], [([9] * (5 + num_new), 5)])
        assert (out[0, [3, 4]] == float("-inf")).all() == held
        assert (out != row).sum() == (2 if held else 0)


def test_a_grammar_at_its_end_may_end_early():
    """Where only a stop token is left, it is taken; where anything else is, it waits."""
    row, how, history = logits(1), Sampling(stop_ids=(3,), min_new=9), [([1], 1)]
    only, other = np.zeros(VOCAB, bool), np.zeros(VOCAB, bool)
    only[3] = other[[3, 8]] = True
    assert shaped(row, [how], history, {0: only}).argmax() == 3
    assert shaped(row, [how], history, {0: other}).argmax() == 8


def test_only_allowed_tokens_are_written_unless_a_grammar_leaves_none_of_them():
    row, how, history = logits(1), Sampling(allowed_ids=(7, 9)), [([1], 1)]
    out = shaped(row, [how], history)
    assert (out[0] > float("-inf")).nonzero()[:, 0].tolist() == [7, 9]
    assert torch.equal(out[0, [7, 9]], row[0, [7, 9]])
    one, none = np.zeros(VOCAB, bool), np.zeros(VOCAB, bool)
    one[[3, 9]] = none[3] = True
    assert shaped(row, [how], history, {0: one}).argmax() == 9
    assert shaped(row, [how], history, {0: none}).argmax() == 3
