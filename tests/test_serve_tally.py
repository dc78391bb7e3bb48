"""Tally: a scrape shows them as it shows prometheus_client's own."""

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from diptych.serve.tally import Count, Spread

BUCKETS = (0.001, 0.5, 1.0)


def shown(registry: CollectorRegistry) -> list[str]:
    """The lines of a scrape, but for the moment at which something was made."""
    return [line for line in generate_latest(registry).decode().splitlines() if "_created" not in line]


@given(st.lists(st.sampled_from((0.0, 0.001, 0.0011, 0.5, 0.7, 1.0, 3.0)) | st.floats(0, 10)))
def test_they_are_shown_as_the_library_shows_its_own(values: list[float]) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    spread, count = Spread("gap_seconds", "Gaps", BUCKETS, ours), Count("tokens", "Tokens", ours)
    histogram = Histogram("gap_seconds", "Gaps", buckets=BUCKETS, registry=theirs)
    counter = Counter("tokens", "Tokens", registry=theirs)
    for value in values:
        spread.observe(value)
        histogram.observe(value)
        count.value += 2
        counter.inc(2)
    assert shown(ours) == shown(theirs)
