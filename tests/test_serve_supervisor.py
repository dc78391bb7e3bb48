"""Which workers are started again, when, and which are not."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from diptych.config import load_cluster
from diptych.errors import DiptychError
from diptych.serve.supervisor import MAX_FAILURES, SOON_S, Child, Supervisor


def ended(status: int, folder: Path, was_up: bool, age_s: float = 2 * SOON_S) -> Child:
    """A worker's process that has ended."""
    process = subprocess.Popen([sys.executable, "-S", "-c", f"raise SystemExit({status})"])
    process.wait()
    child = Child("d0", "diptych.serve.worker_process", process, started=time.monotonic() - age_s)
    child.up = folder / "up"
    if was_up:
        child.up.touch()
        os.utime(child.up, (time.time() - age_s,) * 2)  # it was up for so long
    return child


def supervisor(said: list[str]) -> Supervisor:
    return Supervisor(load_cluster(None, {"engine": "paced"}), said.append)


def test_one_that_was_drained_is_let_go(tmp_path: Path) -> None:
    said: list[str] = []
    made = supervisor(said)
    made.children.append(ended(0, tmp_path, was_up=True))
    made._check(restart=True)
    made._check(restart=True)
    (child,) = made.children
    assert child.process is None and child.restart_at is None and said == ["d0 was drained and has left"]


def test_one_that_was_up_for_long_starts_anew_however_often(tmp_path: Path) -> None:
    said: list[str] = []
    made = supervisor(said)
    child = ended(1, tmp_path, was_up=True)
    for _ in range(3 * MAX_FAILURES):
        made._plan_restart(child, time.monotonic(), "d0 ended")
        assert child.failures == 0 and child.restart_at is not None and child.restart_at <= time.monotonic()
    assert child.incarnation == 3 * MAX_FAILURES


def test_one_that_comes_up_and_soon_ends_waits_and_is_not_given_up(tmp_path: Path) -> None:
    said: list[str] = []
    made = supervisor(said)
    child = ended(1, tmp_path, was_up=True, age_s=1.0)
    waits_s = []
    for _ in range(2 * MAX_FAILURES):
        now = time.monotonic()
        made._plan_restart(child, now, "d0 ended")
        assert child.restart_at is not None
        waits_s.append(round(child.restart_at - now, 3))
    assert waits_s == [0.2, 0.4, 0.8] + [1.6] * 7


def test_one_that_never_comes_up_is_given_up_however_long_it_tries(tmp_path: Path) -> None:
    """Loading takes a minute, and then it fails."""
    said: list[str] = []
    made = supervisor(said)
    child = ended(1, tmp_path, was_up=False, age_s=60.0)
    for _ in range(MAX_FAILURES + 1):
        assert child.process is not None
        made._plan_restart(child, time.monotonic(), "d0 ended")
    assert child.process is None and "given up" in said[-1]


def test_what_others_are_told_to_join(tmp_path: Path) -> None:
    flags = {"engine": "paced", "kv_memory": "1MiB", "mixed": 0, "listen": "127.0.0.1:0", "port": 0}
    with Supervisor(load_cluster(None, flags)) as made:
        made.wait_ready(30.0)
        assert made.joining is not None
        _, address, _, key_file = made.joining.split()
        assert address.startswith("127.0.0.1:") and int(address.split(":")[1]) > 0
        assert Path(key_file).stat().st_mode & 0o777 == 0o600 and Path(key_file).read_text().strip() == made.key
        assert made.key not in made.joining


def test_a_router_that_hangs_is_noticed() -> None:
    flags = {"engine": "paced", "kv_memory": "1MiB", "mixed": 1, "port": 0, "stuck": 2.0}
    with Supervisor(load_cluster(None, flags)) as made:
        made.wait_ready(30.0)
        (router,) = [child for child in made.children if child.name == "router"]
        assert router.process is not None
        router.process.send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + 20.0
        with pytest.raises(DiptychError, match="router is stuck: it showed no sign of life"):
            while time.monotonic() < deadline:
                made._check(restart=True)
                time.sleep(0.05)
        router.process.kill()
