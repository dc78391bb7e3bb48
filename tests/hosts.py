"""Hosts for tests: network namespaces of this machine, joined by a bridge, and the command line run in them."""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

COMMAND = [sys.executable, "-c", "import sys; from diptych.cli import main; sys.exit(main())"]


def why_none() -> str:
    """Why this machine can make no network namespaces; "" where it can."""
    if os.geteuid() != 0:
        return "making network namespaces takes root"
    if shutil.which("ip") is None:
        return "there is no `ip` (Debian: apt-get install iproute2)"
    probe = f"dip-probe-{os.getpid()}"
    tried = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", probe], capture_output=True)
    return "" if tried.returncode == 0 else f"`ip netns add` fails here: {tried.stderr.strip()}"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@dataclass(frozen=True)
class Host:
    """One namespace and its address."""

    name: str
    address: str

    def start(self, *arguments: str, log: Path) -> "subprocess.Popen[bytes]":
        """Run `diptych` there; what it prints goes to a file."""
        return self.run([*COMMAND, *arguments], log)

    def run(self, command: list[str], log: Path) -> "subprocess.Popen[bytes]":
        """Run a command there."""
        with log.open("wb") as file:
            environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
            return subprocess.Popen(
                ["ip", "netns", "exec", self.name, *command], stdout=file, stderr=subprocess.STDOUT, env=environment
            )


@contextlib.contextmanager
def hosts(number: int) -> Iterator[list[Host]]:
    """So many hosts that reach each other, and nobody else."""
    tag = f"{os.getpid() % 100000:05d}"
    made = [Host(f"dip{tag}-{i}", f"10.77.0.{i + 1}") for i in range(number)]
    bridge = f"dip{tag}-sw"
    try:
        ip("netns", "add", bridge)
        ip("-n", bridge, "link", "add", "sw", "type", "bridge")
        ip("-n", bridge, "link", "set", "sw", "up")
        for i, host in enumerate(made):
            ip("netns", "add", host.name)
            ip("-n", host.name, "link", "add", "eth", "type", "veth", "peer", "name", f"port{i}", "netns", bridge)
            ip("-n", bridge, "link", "set", f"port{i}", "master", "sw", "up")
            ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", "eth")
            ip("-n", host.name, "link", "set", "lo", "up")
            ip("-n", host.name, "link", "set", "eth", "up")
        yield made
    finally:
        for name in [*(host.name for host in made), bridge]:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def said(log: Path, text: str, process: "subprocess.Popen[bytes]", limit_s: float = 60.0) -> str:
    """Wait until a process has printed a text; returns all it has printed."""
    deadline = time.monotonic() + limit_s
    while True:
        ended = process.poll() is not None
        printed = log.read_text()
        if text in printed:
            return printed
        assert not ended, f"ended with {process.returncode}:\n{printed}"
        assert time.monotonic() < deadline, f"not a word of {text!r}:\n{printed}"
        time.sleep(0.05)
