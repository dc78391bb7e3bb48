"""The step-time model: it converges on linear steps, follows a change, and keeps a budget."""

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.policy.pace import MIN_STEPS, StepTimes


def learn(times: StepTimes, a: float, b: float, c: float, num_steps: int = 200, seed: int = 1) -> None:
    random = Random(seed)
    for _ in range(num_steps):
        num_new, context = random.randint(1, 512), random.randint(100, 50_000)
        times.observe(num_new, context, a + b * num_new + c * context)


@settings(max_examples=50, deadline=None)
@given(a=st.floats(1e-3, 3e-2), b=st.floats(1e-6, 1e-3), c=st.floats(1e-8, 1e-6))
def test_the_fit_converges(a: float, b: float, c: float) -> None:
    times = StepTimes()
    learn(times, a, b, c)
    for num_new, context in ((1, 100), (64, 20_000), (512, 50_000)):
        assert times.predict(num_new, context) == pytest.approx(a + b * num_new + c * context, rel=0.1)


def test_before_it_knows_better_it_takes_the_worst_seen_per_token() -> None:
    times = StepTimes()
    times.observe(10, 1000, 0.1)
    times.observe(100, 1000, 0.2)
    assert times.num_seen < MIN_STEPS
    assert times.predict(50, 0) == pytest.approx(0.5)


def test_it_follows_a_machine_that_slows_down() -> None:
    times = StepTimes()
    learn(times, 0.01, 1e-4, 1e-7)
    learn(times, 0.02, 2e-4, 2e-7, seed=2)
    assert times.predict(64, 10_000) == pytest.approx(0.02 + 2e-4 * 64 + 2e-7 * 10_000, rel=0.15)


@settings(max_examples=50, deadline=None)
@given(budget=st.floats(0.02, 0.2), num_new=st.integers(1, 64), context=st.integers(0, 50_000))
def test_what_room_allows_stays_inside_the_budget(budget: float, num_new: int, context: int) -> None:
    times = StepTimes()
    learn(times, 0.01, 2e-4, 1e-7)
    room = times.room(budget, num_new, context)
    spare = budget - times.predict(num_new, context)
    if room > 0:
        assert times.predict(num_new + room, context + room) <= budget * 1.0001
        assert times.predict(num_new + room + 2, context + room + 2) > budget, "nor is any room left unused"
    elif spare < 0:
        assert room <= 0
