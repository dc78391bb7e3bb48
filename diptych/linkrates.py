"""How fast KV travels between which workers: links by the names the field gives them, and rules for pairs.

One table for the simulator, which reckons with these rates, and for the emulation of links on one machine, which keeps
to them. Not responsible for either (`sim/reads.py`, `transfer/emulated.py`), nor for what a link was measured to
carry (`policy/handover.py`).
"""

import msgspec

from diptych.errors import ConfigError

RATES = {
    "10gbe": 1.25e9,
    "25gbe": 3.125e9,
    "100gbe": 12.5e9,
    "ndr": 50e9,  # InfiniBand NDR, four lanes: 400 Gb/s
    "pcie4": 31.5e9,  # sixteen lanes
    "nvlink": 450e9,  # fourth generation, one direction
}
"""Bytes per second in one direction."""


class LinkRule(msgspec.Struct, frozen=True):
    """The link between two workers, or, where one is "", between the other and everybody: the same rate each way."""

    one: str
    other: str
    bytes_per_s: float

    def joins(self, source: str, target: str) -> bool:
        """Whether it is about what travels between these two."""
        return any(self.one in ("", a) and self.other in ("", b) for a, b in ((source, target), (target, source)))


class LinkRates(msgspec.Struct, frozen=True):
    """Every pair's link: the last rule that is about the pair, else the default; None is as fast as it goes."""

    default: float | None = None
    rules: tuple[LinkRule, ...] = ()

    def of(self, source: str, target: str) -> float | None:
        """Bytes per second from one worker to another."""
        found = (rule.bytes_per_s for rule in reversed(self.rules) if rule.joins(source, target))
        return next(found, self.default)


def parse_rate(text: str | float) -> float:
    """Bytes per second of a link's name, or of a number of GB/s; ConfigError for anything else."""
    known = RATES.get(str(text).lower())
    if known is not None:
        return known
    try:
        rate = float(text) * 1e9
    except ValueError:
        rate = 0.0
    if not 0 < rate < float("inf"):
        raise ConfigError(f"{text!r} is not a link; give GB/s, or one of {', '.join(RATES)}")
    return rate
