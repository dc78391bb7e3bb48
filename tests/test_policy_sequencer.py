"""What two workers say of one attempt comes out in order, whatever order it arrives in."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.policy.messages import Emit, Finish, Reason
from diptych.policy.sequencer import Sequencer


def test_tokens_that_overtook_the_first_wait_for_it() -> None:
    sequencer: Sequencer[str] = Sequencer(0)
    second, third, end = Emit(64, 1, 1), Emit(64, 2, 3), Finish(64, "d0", Reason.LENGTH)
    assert sequencer.take(second, "b") == sequencer.take(third, "c") == sequencer.take(end, "d") == []
    first = Emit(64, 0, 1)
    assert sequencer.take(first, "a") == [(first, "a"), (second, "b"), (third, "c"), (end, "d")]


def test_a_finish_that_says_nothing_of_tokens_waits_for_none() -> None:
    sequencer: Sequencer[None] = Sequencer(0)
    assert sequencer.take(Emit(64, 1, 1), None) == []
    handed_over = Finish(64, "p0", Reason.HANDED_OVER)
    assert sequencer.take(handed_over, None) == [(handed_over, None)]


def test_an_end_without_any_token_waits_for_none() -> None:
    computed = Finish(64, "p0", Reason.COMPUTED)
    assert Sequencer(0).take(computed, "vector") == [(computed, "vector")]


def test_a_token_that_was_taken_is_refused() -> None:
    sequencer: Sequencer[None] = Sequencer(5)
    assert len(sequencer.take(Emit(64, 5, 2), None)) == 1
    with pytest.raises(ValueError, match="token 6 again"):
        sequencer.take(Emit(64, 6, 1), None)


@given(st.integers(0, 7), st.integers(0, 5))
def test_the_first_token_may_come_at_any_time(late: int, first: int) -> None:
    """The prefill side's token arrives after `late` of what the decode side says, which is in order in itself."""
    said = [Emit(64, first + 2 * i, 2) for i in range(7)] + [Finish(64, "d0", Reason.STOP)]
    arrivals = [*said[1 : late + 1], said[0], *said[late + 1 :]]
    sequencer: Sequencer[None] = Sequencer(first)
    assert [message for arrival in arrivals for message, _ in sequencer.take(arrival, None)] == said
