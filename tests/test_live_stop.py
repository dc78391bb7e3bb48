"""How a cluster ends: what its clients are told, what is printed, and the exit status."""

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from hosts import COMMAND

SLOW = """
engine = "paced"
kv_memory = "1MiB"
[[worker]]
role = "mixed"
[paced]
base_ms = 50.0
"""


@dataclass(frozen=True)
class Served:
    """`diptych serve`, as a user runs it."""

    process: "subprocess.Popen[str]"
    url: str
    errors: Path

    def children(self) -> dict[str, int]:
        """The processes it started, by module."""
        pids = subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True).stdout.split()
        return {Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[2].decode(): int(pid) for pid in pids}


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    (tmp_path / "cluster.toml").write_text(SLOW)
    errors = tmp_path / "errors"
    command = [*COMMAND, "serve", str(tmp_path / "cluster.toml"), "--port", "0"]
    with errors.open("w") as file:
        # As a shell does with what a script puts in the background.
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=file, text=True,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN) and None,
        )  # fmt: skip
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if found := re.search(r"API +(http://\S+)/v1", line):
                yield Served(process, found[1], errors)
                break
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stream_ends_with_an_error_event(served: Served, number: signal.Signals) -> None:
    body = {"prompt": "The fox", "max_tokens": 2000, "ignore_eos": True, "stream": True}
    with httpx.Client(timeout=20) as http, http.stream("POST", f"{served.url}/v1/completions", json=body) as reply:
        lines = reply.iter_lines()
        assert next(lines).startswith("data: ")
        began = time.monotonic()
        served.process.send_signal(number)
        last = [line for line in lines if line][-1]  # raises where the end of the body is missing
        assert time.monotonic() - began < 3.0
    error = json.loads(last.removeprefix("data: "))["error"]
    assert (error["message"], error["type"]) == ("the server is stopping", "service_unavailable_error")
    assert served.process.wait(10) == 0
    printed = served.errors.read_text()
    assert "Traceback" not in printed and "Cancel" not in printed and "draining" not in printed, printed


def test_what_cannot_be_missed_ends_all_with_1(served: Served) -> None:
    os.kill(served.children()["diptych.serve.api_process"], signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        served.process.wait(15)
    assert served.process.returncode == 1
    assert "diptych: api was killed by signal 9 (out of memory?)\n" in served.errors.read_text()
