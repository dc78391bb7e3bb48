"""Workers on their way out: asked when the books are empty, dismissed when they say so or their time is up."""

from diptych.policy.drains import Drains
from diptych.policy.membership import Dismiss, Drain


def test_a_worker_is_asked_once_and_only_when_nothing_is_left_there() -> None:
    drains = Drains()
    drains.begin("d", 9.0)
    assert drains and "d" in drains and drains.next_deadline() == 9.0
    assert drains.proceed(lambda worker: False) == []
    assert drains.proceed(lambda worker: True) == [Drain("d", 0.0)]
    assert drains.proceed(lambda worker: True) == []
    drains.forget("d")
    assert not drains and drains.next_deadline() is None


def test_one_whose_time_is_up_is_dismissed_once() -> None:
    drains = Drains()
    drains.begin("d", 9.0)
    drains.begin("e", float("inf"))
    assert drains.expire(8.9) == [] and drains.expire(9.0) == [Dismiss("d")] and drains.expire(9.1) == []
    assert drains.next_deadline() is None
