"""Whether those who were asked answer: what `/health` says of the cluster, and of every pair that has work.

A pair is silent where it has had work for long, no token of any request has come from it since, and it is not busy with
a prompt, which gives no token for a while, but steps. One such pair beside others that answer makes the cluster
`degraded`, as does a cluster without a pair whose workers stand in for each other; where nobody answers who was asked,
or nobody could be, it is not healthy.

Not responsible for asking workers (`router_process.py`), nor for giving up those that hang (`liveness.py`).
"""

from collections.abc import Iterable, Mapping
from typing import Any

from diptych.serve.router import Open, RouterDriver

SILENT_S = 30.0  # without a token, or a step of a prompt


def report(driver: RouterDriver, now: float, rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What `/health` shows; `healthy` decides its status. rows: what each worker says of itself, where it does."""
    steps_s = {row["id"]: row["last_step_s"] for row in rows if row.get("last_step_s") is not None}
    paths, token_s = driver.policy.num_paths(), now - driver.last_token
    asked = _asked(driver)
    silent = [_told(now, since, group) for group, since in _silent(driver, now, asked, steps_s).items()]
    return {
        "healthy": driver.policy.serves() and (not asked or len(silent) < len(asked)),
        "paths": paths,
        "requests": driver.num_open,
        "last_token_s": round(token_s, 3),
        "last_progress_s": round(min([token_s, *steps_s.values()]), 3),
        "silent": silent,
        "broken_streams": driver.num_broken,
        "resumed": driver.resumed,
        "totals": driver.policy.num,
    }


def _asked(driver: RouterDriver) -> dict[tuple[str, ...], list[Open]]:
    """Requests in flight by who has them."""
    asked: dict[tuple[str, ...], list[Open]] = {}
    for open_ in driver.open:
        if open_.holders:
            asked.setdefault(open_.holders, []).append(open_)
    return asked


def _silent(
    driver: RouterDriver, now: float, asked: Mapping[tuple[str, ...], list[Open]], steps_s: Mapping[str, float]
) -> dict[tuple[str, ...], float]:
    """Who answers nothing, and since when. Of a pair the prefill side is the last that was given its part."""
    silent = {}
    for group, theirs in asked.items():
        since = max(driver.moved.get(group, 0.0), min(open_.placed for open_ in theirs))
        computes = not any(open_.began for open_ in theirs) and steps_s.get(group[-1], SILENT_S) < SILENT_S
        if now - since >= SILENT_S and not computes:
            silent[group] = since
    return silent


def _told(now: float, since: float, group: tuple[str, ...]) -> dict[str, Any]:
    return {"workers": sorted(group), "seconds": round(now - since, 3)}
