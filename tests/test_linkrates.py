"""Links by name, by number, and by rule."""

from pathlib import Path

import pytest

from diptych.config import load_cluster
from diptych.errors import ConfigError
from diptych.linkrates import RATES, LinkRates, LinkRule, parse_rate


def test_names_and_numbers() -> None:
    assert parse_rate("10gbe") == parse_rate("10GbE") == parse_rate(1.25) == parse_rate("1.25") == 1.25e9
    assert sorted(RATES.values())[0] == RATES["10gbe"] and parse_rate("nvlink") == max(RATES.values())


@pytest.mark.parametrize("text", ["", "fast", "-1", "0", 0, "nan", "inf", "10gb"])
def test_what_is_no_link(text: str) -> None:
    with pytest.raises(ConfigError, match="10gbe"):
        parse_rate(text)


def test_the_last_rule_about_a_pair_counts_both_ways() -> None:
    rates = LinkRates(5.0, (LinkRule("", "d1", 1.0), LinkRule("p0", "d1", 2.0), LinkRule("d0", "", 3.0)))
    assert rates.of("p1", "d1") == rates.of("d1", "p1") == 1.0
    assert rates.of("p0", "d1") == rates.of("d1", "p0") == 2.0
    assert rates.of("p0", "d0") == 3.0 and rates.of("p0", "d2") == 5.0
    assert LinkRates().of("p0", "d0") is None


FILE = """
[[worker]]
role = "prefill"
[[worker]]
role = "decode"
count = 2
"""


def cluster(tmp_path: Path, text: str) -> LinkRates:
    (tmp_path / "cluster.toml").write_text(text)
    return load_cluster(tmp_path / "cluster.toml", {}).links


def test_in_a_cluster_file(tmp_path: Path) -> None:
    assert cluster(tmp_path, FILE) == LinkRates()
    assert cluster(tmp_path, 'link = "25gbe"' + FILE).of("p0", "d1") == 3.125e9
    near = cluster(tmp_path, FILE + '[[link]]\nfrom = "p0"\nto = "d1"\nrate = "10gbe"\n')
    assert near.of("d1", "p0") == 1.25e9 and near.of("p0", "d0") is None
    everyone = cluster(tmp_path, FILE + '[[link]]\nrate = 0.5\n[[link]]\nto = "d1"\nrate = "ndr"\n')
    assert everyone.of("p0", "d0") == 5e8 and everyone.of("p0", "d1") == 50e9


@pytest.mark.parametrize(
    ("wrong", "why"),
    [('to = "d9"\nrate = 1', "no such worker"), ('to = "d0"', "rate"), ("rate = -1", "not a link"), ("rat = 1", "rat")],
)
def test_rules_that_make_no_sense(tmp_path: Path, wrong: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        cluster(tmp_path, FILE + f"[[link]]\n{wrong}\n")
