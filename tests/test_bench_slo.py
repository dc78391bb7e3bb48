"""The grammar of service-level objectives."""

from math import inf

import pytest

from diptych.bench.slo import Slo, parse_slo
from diptych.errors import ConfigError


def test_the_grammar() -> None:
    assert parse_slo("ttft=0.5,tpot=0.05") == Slo(ttft=0.5, tpot=0.05)
    assert parse_slo(" itl=0.1 , e2e=2") == Slo(itl=0.1, e2e=2.0)
    assert parse_slo("") == Slo(inf, inf, inf, inf)


def test_it_prints_as_it_is_written() -> None:
    assert str(parse_slo("tpot=0.05,ttft=0.5")) == "ttft=0.5,tpot=0.05"
    assert parse_slo(str(parse_slo("ttft=1.5,e2e=30"))) == Slo(ttft=1.5, e2e=30.0)


@pytest.mark.parametrize(
    "text", ["ttft", "ttft=", "ttft=fast", "ttft=0", "ttft=-1", "ttft=nan", "p99=1", "itl=1,itl=2"]
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_slo(text)


def test_every_limit_counts() -> None:
    slo = Slo(ttft=1.0, tpot=0.1, itl=0.2, e2e=10.0)
    assert slo.met(1.0, 0.1, 0.2, 10.0)
    for late in ((1.1, 0.1, 0.2, 10.0), (1.0, 0.2, 0.2, 10.0), (1.0, 0.1, 0.3, 10.0), (1.0, 0.1, 0.2, 11.0)):
        assert not slo.met(*late)
