"""A load in the words of the command line: what flags give, and what they may not say."""

import argparse
from pathlib import Path

import pytest

from diptych.errors import ConfigError
from diptych.sim.load import Load, add_load_flags, load_of
from diptych.sim.workload import Lengths

TRACES = Path(__file__).parent / "traces"


def given(*flags: str) -> Load:
    parser = argparse.ArgumentParser()
    add_load_flags(parser, rate=2.0, prompt="64-200", output="16", seed=3)
    return load_of(parser.parse_args(flags), requests=10)


def test_without_flags_the_command_decides() -> None:
    load = given()
    assert (load.rate, load.seed, load.requests) == (2.0, 3, 10) and load.output == Lengths(16)
    assert len(list(load.arrivals())) == 10


def test_a_limit_that_is_given_replaces_the_commands_own() -> None:
    load = given("--seconds", "30", "--rate", "4")
    assert load.requests is None and 80 < len(list(load.arrivals())) < 160
    assert all(arrival.time_s < 30 for arrival in load.arrivals())
    assert len(list(given("--seconds", "30", "--requests", "5").arrivals())) == 5


def test_long_prompts_come_at_fixed_gaps_and_change_no_chat() -> None:
    mixed = list(given("--seconds", "7", "--long-every", "2", "--rate", "5").arrivals())
    assert [a.time_s for a in mixed if a.kind == "long"] == pytest.approx([1.0, 3.0, 5.0])
    assert all(2000 <= a.num_prompt <= 4000 for a in mixed if a.kind == "long")
    assert [a for a in mixed if a.kind == "chat"] == list(given("--seconds", "7", "--rate", "5").arrivals())
    assert {a.kind for a in given("--seconds", "9", "--rate", "0", "--long-every", "2").arrivals()} == {"long"}


def test_a_trace_is_a_load() -> None:
    trace = str(TRACES / "mooncake.jsonl")
    assert [a.num_prompt for a in given("--trace", trace).arrivals()] == [1300, 1100, 700, 600]
    assert [a.num_prompt for a in given("--trace", trace, "--seconds", "5", "--time-scale", "2").arrivals()] == [
        1300,
        1100,
    ]
    assert [a.num_prompt for a in given("--trace", trace, "--requests", "1", "--max-prompt", "99").arrivals()] == [99]


def test_prompts_can_be_cut() -> None:
    assert max(a.num_prompt for a in given("--max-prompt", "70").arrivals()) == 70


def test_a_closed_loop_heeds_no_time() -> None:
    load = Load(1.0, requests=20, seconds=5.0)
    assert len(list(load.arrivals())) < 20 == len(list(load.requested()))


def test_it_can_be_said_in_words() -> None:
    assert str(given()) == "2 requests/s, prompt 64-200, answer 16 tokens"
    assert "burstiness 0.5" in str(given("--burstiness", "0.5"))
    assert "every 2 s" in str(given("--long-every", "2"))
    assert str(given("--trace", "x.csv", "--max-prompt", "9")) == "x.csv, times x 1, lengths x 1, prompts up to 9"


@pytest.mark.parametrize(
    "flags",
    [
        ["--rate", "0"],
        ["--rate", "-1"],
        ["--rate", "-1", "--long-every", "2"],
        ["--burstiness", "0"],
        ["--time-scale", "0"],
        ["--length-scale", "-1"],
        ["--requests", "0"],
        ["--max-prompt", "0"],
        ["--seconds", "0"],
        ["--rate", "nan"],
    ],
)
def test_what_makes_no_load_is_refused(flags: list[str]) -> None:
    with pytest.raises(ConfigError):
        given(*flags)


def test_a_load_ends() -> None:
    with pytest.raises(ConfigError, match="without an end"):
        Load()
