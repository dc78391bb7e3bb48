"""Waterfalls: whatever the parts are, they add up to the whole, and none is negative."""

from hypothesis import given
from hypothesis import strategies as st

from diptych.serve.waterfall import waterfall

SECONDS = st.floats(-1e-3, 1e4, allow_nan=False)


@given(SECONDS, st.dictionaries(st.sampled_from("abcdef"), SECONDS))
def test_parts_add_up_exactly(whole: float, parts: dict[str, float]) -> None:
    found = waterfall(whole, parts.items())
    assert sum(found["parts"].values()) == found["us"] == max(round(1e6 * whole), 0)
    assert min(found["parts"].values()) >= 0 and list(found["parts"]) == [*parts, "wire"]


def test_what_nobody_accounts_for_is_the_wire() -> None:
    assert waterfall(0.010, [("queue", 0.001), ("prefill", 0.007)]) == {
        "us": 10_000,
        "parts": {"queue": 1000, "prefill": 7000, "wire": 2000},
    }


def test_what_lies_before_the_whole_is_cut_off_its_beginning() -> None:
    """The decode side heard of the last block 3 ms before the router heard of token 1."""
    found = waterfall(0.010, [("memory", 0.002), ("transfer", 0.006), ("step", 0.005)])
    assert found["parts"] == {"memory": 0, "transfer": 5000, "step": 5000, "wire": 0}
