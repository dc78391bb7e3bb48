"""Health: a pair that has work and says nothing is seen, and one that is busy with a prompt is not taken for one."""

from typing import Any

from router_double import Workers

from diptych.policy.messages import Role
from diptych.serve import health


def report(workers: Workers, **steps_s: float) -> dict[str, Any]:
    rows: list[dict[str, Any]] = [{"id": name, "last_step_s": steps_s.get(name)} for name in ("p0", "p1", "d0", "d1")]
    return health.report(workers.driver, workers.now, rows)


def test_nothing_was_asked() -> None:
    workers = Workers(1, 1)
    workers.now = 1000.0
    assert report(workers)["healthy"] and report(workers)["silent"] == []
    workers.driver.worker_lost("d0")
    assert report(workers)["healthy"] and report(workers)["paths"] == 0, "p0 stands in"
    workers.driver.worker_lost("p0")
    assert not report(workers)["healthy"]


def test_nobody_answers() -> None:
    workers = Workers(1, 1)
    workers.now = 100.0
    workers.submit()
    workers.now = 129.0
    assert report(workers)["healthy"]
    workers.now = 131.0
    assert report(workers)["silent"] == [{"workers": ["d0", "p0"], "seconds": 31.0}]
    assert not report(workers)["healthy"]
    assert report(workers, p0=2.0)["healthy"], "a prompt that takes long is computed in steps"
    workers.write(Role.PREFILL, 0)
    assert report(workers)["healthy"]


def test_after_the_first_token_steps_are_no_excuse() -> None:
    workers = Workers(1, 1)
    workers.submit()
    workers.write(Role.PREFILL, 0)
    workers.now = 40.0
    assert not report(workers, p0=0.1, d0=0.1)["healthy"]


def test_one_pair_of_two_is_silent() -> None:
    workers = Workers(2, 2)
    workers.submit(1)
    first = sorted(place.worker for place in workers.at.values())
    workers.write(Role.PREFILL, 0)
    workers.submit(2)
    assert first != sorted(place.worker for place in workers.at.values())
    workers.write(Role.PREFILL, 0)
    workers.now = 50.0
    workers.write(Role.DECODE, 1)
    said = report(workers)
    assert said["healthy"] and said["silent"] == [{"workers": first, "seconds": 50.0}]


def test_who_is_gone_is_forgotten() -> None:
    workers = Workers(1, 2)
    workers.submit()
    workers.write(Role.PREFILL, 0)
    workers.die(Role.DECODE)
    assert workers.driver.moved == {}
