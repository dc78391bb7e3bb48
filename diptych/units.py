"""Sizes and core numbers as people write them. Not responsible for rates (`linkrates.py`)."""

import re

from diptych.errors import ConfigError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30}


def parse_bytes(text: int | str) -> int:
    """A number of bytes: 1048576, "64MiB", "1.5GB"."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([KMG]I?)?B?\s*", str(text).upper())
    if match is None:
        raise ConfigError(f"{text!r} is not a size; write it like 512MiB or 2GB")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def parse_cores(text: str) -> list[int]:
    """Core numbers: "0,1" or "0-3,8"."""
    cores: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not first.strip().isdigit() or (last and not last.strip().isdigit()):
            raise ConfigError(f"{text!r} is not a list of cores; write it like 0,1 or 0-3")
        cores += range(int(first), int(last or first) + 1)
    return cores
