"""Step costs, and many steps in closed form."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.sim.agenda import SECOND, seconds
from diptych.sim.costs import Costs, StepCost, done_by, elapsed

COEFFICIENT = st.floats(0, 0.1, allow_subnormal=False)


def test_a_step_is_linear_in_new_tokens_and_context() -> None:
    cost = StepCost(0.01, 0.001, 0.0001)
    assert seconds(cost.step(10, 1000)) == pytest.approx(0.01 + 0.01 + 0.1)
    assert seconds(cost.growth(4)) == pytest.approx(0.0004)


@given(COEFFICIENT, COEFFICIENT, COEFFICIENT, st.integers(1, 50), st.integers(1, 10_000), st.integers(1, 60))
def test_closed_form_is_the_sum_of_single_steps(a: float, b: float, c: float, num: int, context: int, n: int) -> None:
    if a + b + c < 1e-12:
        return
    cost = StepCost(a, b, c)
    first, growth = cost.step(num, context), cost.growth(num) or 0
    if first == 1:
        return  # nothing to compute: at least a femtosecond
    singles = [cost.step(num, context + num * i) for i in range(n)]
    assert elapsed(first, growth, n) == sum(singles), "exactly"


@given(st.integers(1, 10**18), st.integers(0, 10**15), st.integers(0, 10_000), st.integers(0, 10**18))
def test_done_by_is_the_inverse_of_elapsed(first: int, growth: int, count: int, extra: int) -> None:
    next_step = elapsed(first, growth, count + 1) - elapsed(first, growth, count)
    assert done_by(first, growth, elapsed(first, growth, count) + extra % next_step) == count


def test_a_step_takes_time() -> None:
    assert StepCost(0, 0, 1e-9).step(1, 0) == 1
    with pytest.raises(ValueError, match="must take time"):
        StepCost(0, 0, 0)


def test_workers_may_differ() -> None:
    slow = StepCost(1, 0, 0)
    costs = Costs(per_worker={"old": slow})
    assert costs.of("old").step(1, 1) == SECOND and costs.of("new") is costs.step
