"""What a worker measures, on a clock that the test reads out."""

import pytest

from diptych.policy.messages import Place, Pull, Purpose, Read, Role, Run, Slice
from diptych.serve.account import MAX_NOTED, Accounts, Prefilled, Received, Stalled, cause_of


def placed(part: Role, rid: int = 64, peer: str = "p0") -> Place:
    return Place("w", rid, part, peer, 100, 100, 10, (), 0, 1)


def accounts() -> Accounts:
    return Accounts(lambda peer: f"lane to {peer}")


def test_a_prompt_in_two_chunks() -> None:
    found = accounts()
    found.placed(1.0, placed(Role.PREFILL))
    found.ordered(1.5, Run(1, (Slice(64, 36, 40, admit=True), Slice(7, 9, 1))))
    found.ordered(2.0, Run(2, (Slice(64, 76, 24, sample=True),)))
    assert 64 in found and found.close(2.75, 64, num_cached=36) == Prefilled(64, 0.5, 1.25, 64, 36, 2)
    assert 64 not in found
    found.ordered(3.0, Run(3, (Slice(64, 100, 1),)))  # of interest no more


def test_the_phases_of_an_arrival_follow_each_other() -> None:
    found = accounts()
    found.placed(0.0, placed(Role.DECODE))
    coming = found.arriving(64)
    assert coming is not None
    found.pulled(1.0, Pull(1, 64, "p0", 0, (1, 2), (3, 4)))
    found.read(3.0, Read(1, 2000, 1.75))
    coming.final(4.0)
    found.pulled(4.5, Pull(2, 64, "p0", 2, (5,), (6,)))
    found.read(5.5, Read(2, 1000, 0.75))
    coming.enter(5.5, "answer")
    coming.enter(5.75, "queue")
    found.ordered(6.75, Run(9, (Slice(64, 100, 1, admit=True, sample=True),)))
    said = found.close(8.0, 64, 0)
    phases = (("memory", 0.5), ("transfer", 1.0), ("answer", 0.25), ("queue", 1.0), ("step", 1.25))
    assert said == Received(64, "p0", "lane to p0", "raw", "", 3000, 2, 0, 2.5, 2.0, phases)
    assert sum(seconds for _, seconds in phases) == 8.0 - 4.0


def test_an_arrival_that_comes_to_nothing_is_computed_here() -> None:
    found = accounts()
    found.placed(0.0, placed(Role.DECODE))
    found.pulled(0.5, Pull(1, 64, "p0", 0, (1,), (3,)))
    coming = found.arriving(64)
    assert coming is not None
    coming.final(1.0)
    found.settled(2.0, 1)
    found.ordered(3.0, Run(1, (Slice(64, 0, 60, admit=True),)))
    found.ordered(4.0, Run(2, (Slice(64, 60, 40, sample=True),)))
    said = found.close(5.0, 64, 0)
    assert isinstance(said, Received) and said.num_failed == 1 and said.num_bytes == 0
    assert said.phases == (("memory", 1.0), ("transfer", 1.0), ("answer", 0.0), ("queue", 0.0), ("step", 2.0))


def test_replicas_are_counted_and_belong_to_nobodys_handover() -> None:
    found = accounts()
    found.placed(0.0, placed(Role.DECODE))
    found.pulled(0.5, Pull(1, 64, "d0", 0, (1,), (3,), Purpose.REPLICA))
    found.read(0.75, Read(1, 500, 0.25))
    found.pulled(0.5, Pull(2, 64, "d0", 0, (1,), (3,), Purpose.REPLICA))
    found.read(0.75, Read(2, 500, 0.25))
    assert found.totals() == [{"source": "d0", "lane": "lane to d0", "purpose": "replica", "bytes": 1000, "reads": 2}]
    said = found.close(1.0, 64, 0)
    assert isinstance(said, Received) and said.num_bytes == 0


def test_what_ends_before_its_first_token_leaves_nothing() -> None:
    found = accounts()
    found.placed(0.0, placed(Role.DECODE))
    found.pulled(0.5, Pull(1, 64, "p0", 0, (1,), (3,)))
    found.note(64, 3, "preempted")
    found.forget(64)
    found.settled(1.0, 1)
    assert 64 not in found and found.stalls(64) is None


def test_the_first_cause_counts_and_there_is_an_end_to_them() -> None:
    found = accounts()
    found.note(64, 3, "preempted")
    found.note(64, 3, "step")
    for token in range(4, 4 + 2 * MAX_NOTED):
        found.note(64, token, "step")
    said = found.stalls(64)
    assert isinstance(said, Stalled) and said.causes[0] == (3, "preempted") and len(said.causes) == MAX_NOTED


@pytest.mark.parametrize(
    ("run", "elapsed_s", "cause"),
    [
        (Run(1, (Slice(64, 100, 1), Slice(128, 0, 512))), 0.1, "prefill"),
        (Run(1, (Slice(64, 100, 1), Slice(128, 7, 1))), 0.1, "step"),
        (Run(1, (Slice(64, 100, 1),)), 0.01, "worker"),
    ],
)
def test_why_a_step_ends_late(run: Run, elapsed_s: float, cause: str) -> None:
    assert cause_of(run, elapsed_s, gap_s=0.12) == cause
