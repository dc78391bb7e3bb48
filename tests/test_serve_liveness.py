"""Who is found to be stuck, and who is forgiven."""

import signal
import subprocess
import sys

from diptych.serve.liveness import PULSE_S, STEP_FACTOR, Liveness, end


def looks(liveness: Liveness[str], seconds: float, now: float, alive: str = "") -> list[tuple[str, str]]:
    """Look every `PULSE_S` for so long; `alive` shows a sign of life before each look."""
    found: list[tuple[str, str]] = []
    for i in range(1, int(seconds / PULSE_S) + 1):
        if alive:
            liveness.heard(alive)
        found = liveness.look(now + i * PULSE_S)
    return found


def test_silence_is_found_and_a_sign_of_life_is_enough() -> None:
    liveness: Liveness[str] = Liveness(10.0)
    liveness.heard("d0")
    liveness.heard("d1")
    liveness.look(100.0)
    assert looks(liveness, 10.0, 100.0, alive="d1") == []
    ((who, why),) = looks(liveness, 1.0, 110.0, alive="d1")
    assert who == "d0" and "no sign of life for 11.0 s" in why
    liveness.forget("d0")
    assert looks(liveness, 20.0, 111.0, alive="d1") == []


def test_who_looks_late_condemns_nobody() -> None:
    """The watcher itself was stopped for a minute: what the others said meanwhile waits in its sockets."""
    liveness: Liveness[str] = Liveness(10.0)
    liveness.heard("d0")
    liveness.look(100.0)
    assert liveness.look(160.0) == []
    assert looks(liveness, 8.0, 160.0) == []
    assert len(looks(liveness, 3.0, 168.0)) == 1


def test_a_step_that_does_not_end() -> None:
    """The event loop turns, and the engine hangs."""
    liveness: Liveness[str] = Liveness(20.0)
    liveness.heard("d0", 20.0 * STEP_FACTOR)
    assert liveness.look(0.0) == []
    liveness.heard("d0", 20.0 * STEP_FACTOR + 1)
    ((_, why),) = liveness.look(0.5)
    assert "its step has not ended for 121 s" in why
    liveness.heard("d0", 0.0)
    assert liveness.look(1.0) == []


def test_never() -> None:
    liveness: Liveness[str] = Liveness(0.0)
    liveness.heard("d0", 1e9)
    assert looks(liveness, 100.0, 0.0) == []


def test_one_that_is_stopped_ends_all_the_same() -> None:
    process = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
    process.send_signal(signal.SIGSTOP)
    end(process.pid)
    assert process.wait(10) == -signal.SIGKILL
    end(process.pid)  # gone already: nothing to do
