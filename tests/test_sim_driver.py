"""The virtual-time driver by numbers that can be worked out by hand."""

import pytest

from diptych.policy.batching import WorkerSpec
from diptych.policy.messages import Role
from diptych.policy.router import RouterSpec
from diptych.sim.conditions import ClientGone, Happening, LinkBreaks, WorkerDies, WorkerDrains, WorkerJoins
from diptych.sim.costs import Costs, Link, StepCost
from diptych.sim.driver import SimResult, Simulation, Stuck, simulate
from diptych.sim.load import Load
from diptych.sim.run import make_cluster, run_simulation
from diptych.sim.workload import Arrival, Lengths

COSTS = Costs(StepCost(0.010, 0.001, 0.0), kv_bytes_per_token=1000, message_s=0.0, settle_s=0.0)
LINK = Link(bytes_per_s=1e6, latency_s=0.0)
MIXED = [WorkerSpec("m", Role.MIXED, 64)]
PAIR = [WorkerSpec("p", Role.PREFILL, 64), WorkerSpec("d", Role.DECODE, 64)]


def run(
    cluster: list[WorkerSpec], *arrivals: Arrival, costs: Costs = COSTS, happenings: tuple[Happening, ...] = ()
) -> SimResult:
    return simulate(cluster, RouterSpec(), costs, LINK, arrivals, happenings=happenings)


def test_one_request_takes_what_its_steps_take() -> None:
    (stream,) = run(MIXED, Arrival(1.0, 20, 4, 4)).streams
    assert list(stream.times()) == pytest.approx([1.030, 1.041, 1.052, 1.063])


def test_tokens_and_requests_travel() -> None:
    costs = Costs(COSTS.step, message_s=0.1)
    (stream,) = run(MIXED, Arrival(1.0, 20, 2, 2), costs=costs).streams
    assert list(stream.times()) == pytest.approx([1.230, 1.241])


def test_a_handover_costs_the_transfer_between_the_first_and_the_second_token() -> None:
    (stream,) = run(PAIR, Arrival(0.0, 20, 3, 3)).streams
    assert list(stream.times()) == pytest.approx([0.030, 0.030 + 0.032 + 0.011, 0.084]), "two blocks of 16 kB at 1 MB/s"


def test_an_answer_ends_where_the_oracle_says_or_at_its_limit() -> None:
    streams = run(MIXED, Arrival(0.0, 4, 9, 3), Arrival(0.0, 4, 5, 5)).streams
    assert [(s.num_tokens, s.why) for s in streams] == [(3, "stop"), (5, "length")]


def test_work_is_counted() -> None:
    result = run(PAIR, Arrival(0.0, 20, 3, 3))
    prefill, decode = result.machines
    assert prefill.busy_s == pytest.approx(0.030) and decode.busy_s == pytest.approx(0.022)
    assert (prefill.num_steps, decode.num_steps, result.kv_bytes) == (1, 2, 32_000)


def test_a_client_that_leaves_gets_nothing_more() -> None:
    result = run(MIXED, Arrival(0.0, 4, 50, 50), happenings=(ClientGone(0.0475, 0),))
    (stream,) = result.streams
    assert stream.status == "cancelled" and stream.num_tokens == 4 and result.counts["cancelled"] == 1


def test_a_request_survives_its_worker() -> None:
    cluster = [*MIXED, WorkerSpec("n", Role.MIXED, 64)]
    (stream,) = run(cluster, Arrival(0.0, 4, 8, 8), happenings=(WorkerDies(0.050, "m"),)).streams
    times = list(stream.times())
    assert stream.status == "finished" and stream.num_attempts == 2
    assert times[4] - times[3] == pytest.approx(0.003 + 0.018), "what was lost, and eight tokens computed anew"


def test_a_worker_that_comes_back_is_used() -> None:
    arrivals = (Arrival(0.0, 4, 8, 8), Arrival(0.5, 4, 8, 8))
    result = run(MIXED, *arrivals, happenings=(WorkerDies(0.050, "m", 0.1),))
    assert [stream.status for stream in result.streams] == ["failed", "finished"]


def test_a_worker_that_joins_is_used() -> None:
    joins = WorkerJoins(0.2, WorkerSpec("n", Role.MIXED, 64))
    result = run([], Arrival(0.0, 4, 8, 8), Arrival(0.5, 4, 8, 8), happenings=(joins,))
    assert [stream.status for stream in result.streams] == ["rejected", "finished"]


def test_a_worker_that_drains_finishes_what_it_has() -> None:
    cluster = [*MIXED, WorkerSpec("n", Role.MIXED, 64)]
    arrivals = (Arrival(0.0, 4, 8, 8), Arrival(0.06, 4, 8, 8))
    result = run(cluster, *arrivals, happenings=(WorkerDrains(0.05, "m"),))
    assert [(stream.status, stream.num_attempts) for stream in result.streams] == [("finished", 1)] * 2
    assert [machine.num_steps for machine in result.machines] == [8, 8]


def test_a_drain_that_takes_too_long_is_cut_short() -> None:
    cluster = [*MIXED, WorkerSpec("n", Role.MIXED, 64)]
    (stream,) = run(cluster, Arrival(0.0, 4, 20, 20), happenings=(WorkerDrains(0.02, "m", 0.05),)).streams
    assert (stream.status, stream.num_tokens, stream.num_attempts) == ("finished", 20, 2)


def test_a_pair_whose_connection_breaks_is_left_for_another() -> None:
    cluster = [*PAIR, WorkerSpec("e", Role.DECODE, 64)]
    (stream,) = run(cluster, Arrival(0.0, 20, 3, 3), happenings=(LinkBreaks(0.035, "p", "d"),)).streams
    assert (stream.status, stream.num_tokens) == ("finished", 3)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="names"):
        Simulation([*MIXED, *MIXED], RouterSpec(), COSTS, LINK, [])
    with pytest.raises(ValueError, match="block size"):
        Simulation([PAIR[0], WorkerSpec("x", Role.DECODE, 64, 32)], RouterSpec(), COSTS, LINK, [])
    with pytest.raises(ValueError, match="mixed worker"):
        run_simulation(make_cluster(prefill=1), arrivals=[])


def test_a_simulation_can_be_given_a_limit() -> None:
    with pytest.raises(Stuck):
        simulate(MIXED, RouterSpec(), COSTS, LINK, [Arrival(0.0, 4, 50, 50)], num_events=3)


def test_the_short_form() -> None:
    load = Load(rate=5, prompt=Lengths(100), output=Lengths(10), requests=20)
    result = run_simulation(make_cluster(prefill=1, decode=2), arrivals=load.arrivals())
    assert result.counts["finished"] == 20
    assert [machine.name for machine in result.machines] == ["prefill-0", "decode-0", "decode-1"]
