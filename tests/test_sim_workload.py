"""Arrivals: reproducible, in order, with the lengths and prefixes that were asked for."""

from itertools import pairwise
from math import inf
from random import Random
from statistics import mean, stdev

import pytest

from diptych.errors import ConfigError
from diptych.sim.run import make_cluster, run_simulation
from diptych.sim.workload import Arrival, Lengths, Workload, first, generate, merge, parse_lengths


def test_same_seed_same_arrivals() -> None:
    workload = Workload(5.0, Lengths(100, "lognormal"), Lengths(20, "uniform"))
    assert first(generate(workload, 3), 50) == first(generate(workload, 3), 50) != first(generate(workload, 4), 50)


def test_arrivals_have_the_rate_and_is_in_order() -> None:
    times = [arrival.time_s for arrival in first(generate(Workload(10.0), 1), 5000)]
    assert times == sorted(times) and times[-1] == pytest.approx(500, rel=0.1)


@pytest.mark.parametrize("kind", ["fixed", "uniform", "lognormal"])
def test_lengths_have_their_mean(kind: str) -> None:
    lengths = Lengths(200, kind, 0.5)  # type: ignore[arg-type]
    random = Random(1)
    drawn = [lengths.draw(random) for _ in range(20_000)]
    assert sum(drawn) / len(drawn) == pytest.approx(200, rel=0.05) and min(drawn) >= 1
    assert max(Lengths(200, "lognormal", 2.0, limit=300).draw(random) for _ in range(100)) <= 300


def test_a_group_shares_its_prompt_and_nothing_else() -> None:
    workload = Workload(1.0, Lengths(64), Lengths(8), groups=2, shared_prompt=48)
    arrivals = first(generate(workload, 1), 20)
    assert all(arrival.num_prompt == 112 and len(arrival.hashes) == 7 for arrival in arrivals)
    assert len({arrival.hashes[:3] for arrival in arrivals}) == 2
    assert len({digest for arrival in arrivals for digest in arrival.hashes[3:]}) == 4 * 20


def test_a_further_turn_repeats_all_that_was_said() -> None:
    workload = Workload(0.1, Lengths(40), Lengths(24), turns=3, think_s=1.0)
    arrivals = first(generate(workload, 1), 30)
    assert [a.time_s for a in arrivals] == sorted(a.time_s for a in arrivals)
    opening, then, *_ = [arrival for arrival in arrivals if arrival.stem == arrivals[0].stem]
    assert then.num_prompt == 40 + 24 + 40
    assert then.hashes[:4] == tuple(opening.text_hash(i) for i in range(4)), "its answer included"


def spread_of_gaps(burstiness: float) -> float:
    """The coefficient of variation of the gaps: 1 / sqrt(shape) for a gamma distribution."""
    times = [arrival.time_s for arrival in first(generate(Workload(10.0, burstiness=burstiness), 1), 4000)]
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert mean(gaps) == pytest.approx(0.1, rel=0.1), "the rate is the same"
    return stdev(gaps) / mean(gaps)


def test_burstiness_is_the_shape_of_the_gaps() -> None:
    assert spread_of_gaps(1.0) == pytest.approx(1.0, rel=0.1)
    assert spread_of_gaps(0.25) == pytest.approx(2.0, rel=0.1)
    assert spread_of_gaps(4.0) == pytest.approx(0.5, rel=0.1)
    assert spread_of_gaps(inf) == pytest.approx(0.0, abs=1e-6)


def test_lengths_are_written_in_three_ways() -> None:
    random = Random(1)
    for text, kind in (("512", "fixed"), ("64-200", "uniform"), ("~512", "lognormal"), ("7-7", "fixed")):
        lengths = parse_lengths(text)
        assert lengths.kind == kind and str(lengths) in (text, "7")
    drawn = {parse_lengths("3-6").draw(random) for _ in range(1000)}
    assert drawn == {3, 4, 5, 6}, "the bounds are in it, and nothing beyond"
    for wrong in ("", "0", "-3", "9-3", "0-4", "a", "1-2-3", "1.5", "~"):
        with pytest.raises(ConfigError):
            parse_lengths(wrong)


def test_workloads_can_be_merged_and_traces_put_in() -> None:
    trace = [Arrival(0.5, 10, 5, 5), Arrival(1.5, 10, 5, 5)]
    merged = first(merge(trace, generate(Workload(1.0), 1)), 10)
    assert [a.time_s for a in merged] == sorted(a.time_s for a in merged) and set(trace) <= set(merged)


def test_a_workload_of_embeddings_is_finished_without_a_token() -> None:
    arrivals = first(generate(Workload(20.0, Lengths(300, "uniform"), max_new=0), 1), 50)
    assert {(arrival.max_new, arrival.output_len) for arrival in arrivals} == {(0, 0)}
    result = run_simulation(make_cluster(prefill=2, decode=1), arrivals=arrivals)
    assert result.counts["finished"] == 50 and not any(stream.num_tokens for stream in result.streams)
    assert {machine.name for machine in result.machines if machine.num_steps} == {"prefill-0", "prefill-1"}


def test_impossible_lengths_are_refused() -> None:
    assert Arrival(0.0, 1, 0, 0).max_new == 0, "an embedding writes nothing"
    for lengths in ((0, 1, 1), (1, 1, 0), (1, 1, 2), (0, 0, 0), (1, 0, 1)):
        with pytest.raises(ValueError, match="lengths"):
            Arrival(0.0, *lengths)
