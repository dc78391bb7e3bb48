"""Fair sharing against an oracle that moves bytes in small slices of time."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.linkrates import LinkRates, LinkRule
from diptych.sim.agenda import instant, seconds
from diptych.sim.costs import Link
from diptych.sim.links import SharedLink


def drain(link: SharedLink, joins: list[tuple[float, int]]) -> dict[int, float]:
    """When each transfer ends, joining at the given (seconds, bytes)."""
    waiting = sorted((instant(when), i, size) for i, (when, size) in enumerate(joins))
    ends: dict[int, float] = {}
    while waiting or len(ends) < len(joins):
        due = link.next_end()
        if waiting and (due is None or waiting[0][0] < due[0]):
            when, i, size = waiting.pop(0)
            link.add(when, i, size)
        else:
            assert due is not None
            link.remove(*due)
            ends[int(due[1])] = seconds(due[0])  # type: ignore[call-overload]
    return ends


def test_one_transfer_has_the_link_to_itself() -> None:
    assert drain(SharedLink(1000.0), [(1.0, 500)]) == {0: pytest.approx(1.5)}


def test_two_share_it_and_the_one_that_is_left_speeds_up() -> None:
    assert drain(SharedLink(1000.0), [(0.0, 1000), (0.5, 250)]) == {1: pytest.approx(1.0), 0: pytest.approx(1.25)}


def test_one_that_is_given_up_leaves_its_share_to_the_others() -> None:
    link = SharedLink(1000.0)
    link.add(0, "a", 1000)
    link.add(0, "b", 1000)
    link.remove(instant(1.0), "b")
    due = link.next_end()
    assert due is not None and seconds(due[0]) == pytest.approx(1.5) and due[1] == "a"


@given(st.lists(st.tuples(st.integers(0, 40).map(lambda t: t / 10), st.integers(1, 3000)), min_size=1, max_size=8))
def test_it_is_what_slices_of_time_converge_to(joins: list[tuple[float, int]]) -> None:
    rate, slice_s = 1000.0, 0.002
    left = {i: float(size) for i, (_, size) in enumerate(joins)}
    ends: dict[int, float] = {}
    now = 0.0
    while left:
        active = [i for i in left if joins[i][0] <= now + slice_s / 2]
        now += slice_s
        for i in active:
            left[i] -= rate * slice_s / len(active)
            if left[i] <= 1e-9:
                ends[i] = now
                del left[i]
    exact = drain(SharedLink(rate), joins)
    assert exact == {i: pytest.approx(end, abs=len(joins) * 2 * slice_s) for i, end in ends.items()}


def test_who_shares_a_link() -> None:
    keys = {shared: Link(shared=shared).key("p0", "d1") for shared in ("pair", "source", "target", "all")}
    assert len(set(keys.values())) == 4
    assert Link(shared="source").key("p0", "d2") == keys["source"] and Link(shared="all").key("p1", "d2") == keys["all"]


def test_pairs_may_have_links_of_their_own() -> None:
    link = Link(100.0, rates=LinkRates(None, (LinkRule("p0", "d1", 5.0),)))
    assert link.key("p0", "d1") == ("p0", "d1") and link.key("p0", "d0") == ("p0", "") == link.key("p0", "d2")
    assert link.rate(link.key("p0", "d1")) == 5.0 and link.rate(link.key("p0", "d0")) == 100.0
    assert Link(100.0, shared="pair").rate(("p0", "d1")) == 100.0
