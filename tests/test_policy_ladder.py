"""The two ladders: what may follow what, and times that add up."""

from enum import StrEnum

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.policy.ladder import REQUEST, TRANSFER, Ladder, Rung, Stage


def test_a_request_climbs_and_its_times_add_up() -> None:
    life = Ladder(REQUEST, Rung.QUEUED, 1.0)
    for now, rung in ((2.5, Rung.PREFILLING), (3.0, Rung.HANDOVER), (3.25, Rung.DECODING), (9.0, Rung.FINISHED)):
        life.climb(rung, now)
    assert life.durations() == (("queued", 1.5), ("prefilling", 0.5), ("handover", 0.25), ("decoding", 5.75))


def test_staying_costs_nothing_and_coming_back_adds() -> None:
    life = Ladder(REQUEST, Rung.DECODING, 0.0)
    life.climb(Rung.DECODING, 1.0)
    life.climb(Rung.QUEUED, 2.0)  # a preemption
    life.climb(Rung.PREFILLING, 3.0)
    life.climb(Rung.DECODING, 4.0)
    life.climb(Rung.FINISHED, 6.0)
    assert dict(life.durations()) == {"decoding": 4.0, "queued": 1.0, "prefilling": 1.0}


def test_a_step_that_is_not_drawn_is_refused() -> None:
    for edges, start, to in ((REQUEST, Rung.FINISHED, Rung.DECODING), (TRANSFER, Stage.SETTLED, Stage.READING)):
        ladder: Ladder[StrEnum] = Ladder(edges, start, 0.0)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="no step"):
            ladder.climb(to, 1.0)
        assert ladder.at == start


@pytest.mark.parametrize("edges, ends", [(REQUEST, 4), (TRANSFER, 1)])
def test_every_rung_can_be_reached_and_left_unless_it_is_an_end(
    edges: dict[StrEnum, frozenset[StrEnum]], ends: int
) -> None:
    assert all(to in edges for after in edges.values() for to in after)
    assert sum(not after for after in edges.values()) == ends
    reached = set().union(*edges.values())
    assert {rung for rung in edges if rung not in reached} <= {Rung.QUEUED}


@given(st.data(), st.lists(st.floats(0, 10), min_size=1, max_size=20))
def test_durations_add_up_to_the_time_since_the_start(data: st.DataObject, pauses: list[float]) -> None:
    life = Ladder(REQUEST, Rung.QUEUED, 0.0)
    now = 0.0
    for pause in pauses:
        if not REQUEST[life.at]:
            break
        now += pause
        life.climb(data.draw(st.sampled_from(sorted(REQUEST[life.at]))), now)
    assert sum(spent for _, spent in life.durations()) == pytest.approx(now)
