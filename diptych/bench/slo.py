"""What counts as good service: the grammar `ttft=0.5,tpot=0.05`, and the test of one request against it.

Not responsible for measuring.
"""

from dataclasses import dataclass, fields
from math import inf

from diptych.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Slo:
    """Limits in seconds; a limit that is not given is infinite. itl: the longest gap between two tokens."""

    ttft: float = inf
    tpot: float = inf
    itl: float = inf
    e2e: float = inf

    def met(self, ttft: float, tpot: float, itl: float, e2e: float) -> bool:
        """A request with these times was served well."""
        return ttft <= self.ttft and tpot <= self.tpot and itl <= self.itl and e2e <= self.e2e

    def __str__(self) -> str:
        limits = {field.name: getattr(self, field.name) for field in fields(self)}
        return ",".join(f"{name}={limit:g}" for name, limit in limits.items() if limit < inf)


def parse_slo(text: str) -> Slo:
    """`ttft=0.5,tpot=0.05`: seconds; ConfigError for anything else."""
    names = [field.name for field in fields(Slo)]
    limits: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = part.partition("=")
        if name not in names or name in limits:
            raise ConfigError(f"{part!r}: an SLO is written like ttft=0.5,tpot=0.05 (seconds); known: {names}")
        try:
            limits[name] = float(value)
        except ValueError:
            raise ConfigError(f"{part!r}: {value!r} is not a number of seconds") from None
        if not limits[name] > 0:
            raise ConfigError(f"{part!r}: a limit is more than 0 seconds")
    return Slo(**limits)
