"""Where the time of a request went: durations of several processes as parts that add up exactly.

A whole is measured by one process; its parts are durations that others measured within it, on clocks of their own. What
none of them accounts for has a name, too: `wire`, messages on their way and processes that are busy. Everything is in
whole microseconds, so that the sum is the whole and not nearly so. Not responsible for measuring.
"""

from collections.abc import Iterable
from typing import Any

REST = "wire"


def micros(seconds: float) -> int:
    """Whole microseconds."""
    return round(1e6 * seconds)


def waterfall(whole_s: float, parts: Iterable[tuple[str, float]]) -> dict[str, Any]:
    """`{"us": whole, "parts": {name: us, ..., "wire": us}}`; the parts, in seconds, are in the order of time.

    Where they are longer than the whole, their beginning lies before it: decode sides may hear that all KV is
    published before the router hears of token 1. That much is cut off the first ones. No part is ever negative.
    """
    whole = max(micros(whole_s), 0)
    lengths = {name: max(micros(seconds), 0) for name, seconds in parts}
    over = sum(lengths.values()) - whole
    for name, length in lengths.items():
        cut = min(max(over, 0), length)
        lengths[name] -= cut
        over -= cut
    return {"us": whole, "parts": lengths | {REST: whole - sum(lengths.values())}}
