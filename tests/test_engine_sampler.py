"""Sampling: what may come out, how often, and that nothing but logits, parameters, seed and position matters."""

import random

import pytest

torch = pytest.importorskip("torch")

from diptych.engine.executor import Sampling  # noqa: E402
from diptych.engine.sampler import choose, filtered, uniform  # noqa: E402

torch.set_num_threads(1)


def draws(logits, n, **how):
    rows = logits.expand(n, -1)
    return choose(rows, [Sampling(**how)] * n, range(n))


def test_greedy_is_the_argmax_and_temperature_zero_ignores_the_rest():
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    how = [Sampling(seed=s, top_k=3, top_p=0.1) for s in range(5)]
    assert choose(logits, how, range(5)) == logits.argmax(-1).tolist()


def test_frequencies_follow_the_probabilities():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    n = 4000
    counts = torch.bincount(torch.tensor(draws(logits, n, temperature=0.7)), minlength=4) / n
    assert torch.allclose(counts.double(), (logits.double() / 0.7).softmax(-1), atol=0.03)  # 3.8 sigma at worst


@pytest.mark.parametrize("k", [1, 3, 10])
def test_top_k_keeps_the_k_most_likely(k):
    logits = torch.randn(30, generator=torch.Generator().manual_seed(k))
    allowed = set(logits.topk(k).indices.tolist())
    assert set(draws(logits, 300, temperature=3.0, top_k=k)) <= allowed
    assert set(filtered(logits, Sampling(temperature=3.0, top_k=k)).nonzero().flatten().tolist()) == allowed


@pytest.mark.parametrize("p", [0.0, 0.3, 0.9, 1.0])
def test_top_p_keeps_the_smallest_nucleus(p):
    """Against a dumb oracle: take the most likely until they reach p."""
    logits = torch.randn(40, generator=torch.Generator().manual_seed(7)) * 2
    probabilities = logits.double().softmax(-1).tolist()
    allowed, total = set(), 0.0
    for token in sorted(range(40), key=lambda t: -probabilities[t]):
        if allowed and total >= p:
            break
        allowed.add(token)
        total += probabilities[token]
    assert set(filtered(logits, Sampling(temperature=1.0, top_p=p)).nonzero().flatten().tolist()) == allowed
    assert set(draws(logits, 200, temperature=1.0, top_p=p)) <= allowed


def test_top_p_works_on_what_top_k_left():
    logits = torch.tensor([3.0, 2.0, 1.0, 0.0]).log_softmax(-1)
    # Of three the first has 0.665, so a nucleus of 0.66 is the first alone; of four it has 0.644 and needs a second.
    assert filtered(logits, Sampling(temperature=1.0, top_k=3, top_p=0.66)).count_nonzero() == 1
    assert filtered(logits, Sampling(temperature=1.0, top_p=0.66)).count_nonzero() == 2


@pytest.mark.parametrize("p", [0.05, 0.3, 1.0])
def test_min_p_is_relative_to_the_most_likely(p):
    logits = torch.randn(40, generator=torch.Generator().manual_seed(9)) * 2
    probabilities = (logits.double() / 0.7).softmax(-1)
    allowed = set((probabilities >= p * probabilities.max() * (1 - 1e-12)).nonzero().flatten().tolist())
    how = {"temperature": 0.7, "min_p": p}
    assert set(filtered(logits, Sampling(**how)).nonzero().flatten().tolist()) == allowed
    assert set(draws(logits, 200, **how)) <= allowed


def test_top_p_works_on_what_min_p_left():
    logits = torch.tensor([3.0, 2.0, 1.0, 0.0]).log_softmax(-1)
    # Without the last the first has 0.665, so a nucleus of 0.66 is the first alone; of four it has 0.644.
    assert filtered(logits, Sampling(temperature=1.0, min_p=0.1, top_p=0.66)).count_nonzero() == 1


def test_a_row_does_not_know_its_batch():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(12, 200, generator=generator)
    rng = random.Random(0)
    how = [
        Sampling(
            temperature=rng.choice([0.0, 0.5, 1.5]), top_k=rng.choice([0, 20]), top_p=rng.choice([1.0, 0.8]), seed=s
        )
        for s in range(12)
    ]
    together = choose(logits, how, list(range(100, 112)))
    alone = [choose(logits[i : i + 1], [how[i]], [100 + i])[0] for i in range(12)]
    order = rng.sample(range(12), 12)
    shuffled = choose(logits[order], [how[i] for i in order], [100 + i for i in order])
    assert together == alone == [shuffled[order.index(i)] for i in range(12)]


def test_seed_and_position_both_matter_and_nothing_else_does():
    logits = torch.zeros(1000)
    by_position = draws(logits, 200, temperature=1.0, seed=5)
    assert by_position == draws(logits, 200, temperature=1.0, seed=5)
    assert len(set(by_position)) > 150
    assert by_position != draws(logits, 200, temperature=1.0, seed=6)
    # Neighbouring seeds and positions must not give shifted copies of one stream.
    assert by_position[1:] != draws(logits, 200, temperature=1.0, seed=6)[:-1]


def test_uniform_numbers_are_uniform_and_big_or_negative_seeds_are_fine():
    numbers = [uniform(seed, position) for seed in range(50) for position in range(100)]
    assert all(0 <= u < 1 for u in numbers) and len(set(numbers)) == len(numbers)
    deciles = [sum(d <= 10 * u < d + 1 for u in numbers) for d in range(10)]
    assert max(abs(count - 500) for count in deciles) < 100  # 4.7 sigma
    assert 0 <= uniform(2**70 + 1, 3) < 1 and uniform(-1, 3) != uniform(1, 3)


def test_a_last_bit_of_a_logit_hardly_moves_the_draw():
    """Two equally likely tokens that change places in the ranking must not reshuffle the others."""
    logits = torch.zeros(100)
    nudged = logits.clone()
    nudged[::2] += 1e-6
    pairs = zip(draws(logits, 500, temperature=1.0), draws(nudged, 500, temperature=1.0), strict=True)
    assert sum(a == b for a, b in pairs) >= 498


def test_bfloat16_logits_and_extreme_values():
    logits = torch.tensor([float("-inf"), 0.0, 80.0, float("-inf")], dtype=torch.bfloat16)
    assert set(draws(logits, 50, temperature=1.0)) == {2}
    assert set(draws(logits, 50, temperature=1e-3, top_p=0.5, top_k=2)) == {2}
