"""The compute thread: whose step it was that failed."""

import asyncio
import logging
import os
from typing import Any

import pytest

from diptych.policy.messages import Run, Slice
from diptych.serve.compute import ComputeThread


class Broken:
    """An executor that launches the first step, and fails at what is asked of it then."""

    def __init__(self, at: str):
        self._at = at

    def launch(self, run: Run) -> None:
        if self._at == "launch" and run.step == 2:
            raise RuntimeError("out of memory")

    def collect(self, handle: Any) -> None:
        raise RuntimeError("out of memory")


def run_of(step: int, *rids: int) -> Run:
    """A step with a token for each of them."""
    return Run(step, tuple(Slice(rid, 0, 1, (), False, True) for rid in rids))


@pytest.mark.parametrize("at", ["launch", "collect"])
def test_a_step_that_failed_names_its_requests(
    at: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail() -> int:
        ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        loop = asyncio.get_running_loop()
        monkeypatch.setattr(os, "_exit", lambda status: loop.call_soon_threadsafe(ended.set_result, status))
        names = {64: "mine", 128: "yours"}
        thread = ComputeThread(Broken(at), 2, lambda step, result: None, names.__getitem__)  # type: ignore[arg-type]
        thread.run(run_of(1, 64))
        thread.run(run_of(2, 64, 128))
        status = await asyncio.wait_for(ended, 10)
        thread.stop()
        return status

    with caplog.at_level(logging.ERROR):
        assert asyncio.run(fail()) == 1
    (line,) = caplog.records
    assert line.fields["requests"].split()[0] == "mine"  # type: ignore[attr-defined]
    if at == "launch":
        assert line.fields == {"requests": "mine yours"}  # type: ignore[attr-defined]
