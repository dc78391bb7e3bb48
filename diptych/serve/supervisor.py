"""Starts the processes of a cluster on this host, watches them, and stops them in order.

A worker that ends is started again as a new incarnation, later each time it fails early, unless it was drained; the
router and the API process are needed, so if one of them ends, or hangs, everything stops with a reason. Not responsible
for workers that hang (the router ends them) nor for other hosts: there a worker joins by address (`join.py`), and
whoever started it watches it.
"""

import contextlib
import errno
import http.client
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from diptych.config import Cluster
from diptych.errors import ConfigError, DiptychError
from diptych.serve.channel import join_host, split_host
from diptych.serve.liveness import Liveness
from diptych.serve.process import WRONG, Orders, settings_of
from diptych.serve.runtime import Runtime, check_host

START_S = 120.0  # how long a cluster may take to be ready (loading a large model)
STOP_S = 8.0  # how long a process may take to stop before it is killed
DRAIN_S = 3.0  # how long workers may take to drain when everything stops; nobody asks anything any more
SOON_S = 10.0  # a worker that ends before it was up, or within this long of its start, has failed
MAX_FAILURES = 5  # failures in a row after which a worker that does not come up is given up
MOST_WAITED = 4  # failures in a row for which one that does come up is made to wait; it is never given up
POLL_S = 0.1


@dataclass(slots=True)
class Child:
    """One process of the cluster, over its incarnations."""

    name: str
    module: str
    process: "subprocess.Popen[bytes] | None" = None
    up: Path = Path()  # a file that is there once this incarnation has been up
    alive: Path = Path()  # a file that is touched as long as the event loop turns
    touched: float = 0.0
    incarnation: int = 0
    started: float = 0.0
    failures: int = 0
    restart_at: float | None = None


@dataclass
class Supervisor:
    """Runs a cluster: `with Supervisor(cluster) as s: s.wait_ready(); s.watch()`. `port` is known at once."""

    cluster: Cluster
    on_event: Callable[[str], None] = lambda text: None
    children: list[Child] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._liveness: Liveness[str] = Liveness(self.cluster.stuck_s)

    def __enter__(self) -> "Supervisor":
        check_host(self.cluster)
        self._sockets = {"api": _listen(self.cluster.host, self.cluster.port, "--port")}
        self.port: int = self._sockets["api"].getsockname()[1]
        self._folder = Runtime()
        self.runtime = self._folder.path
        self.key = self.cluster.cluster_key or secrets.token_hex(16)
        try:
            self._open_to_others()
            self._start(Child("router", "diptych.serve.router_process"))
            self._wait_for_router()
            for worker in self.cluster.workers:
                self._start(Child(worker.name, "diptych.serve.worker_process"))
            self._start(Child("api", "diptych.serve.api_process"))
        except BaseException:
            self.stop()
            raise
        finally:
            for sock in self._sockets.values():
                sock.close()  # the API process and the router have them
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """Where the API answers."""
        host = self.cluster.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    def _open_to_others(self) -> None:
        """Bind where workers of other hosts call, and write the key to a file where nobody else can know it yet."""
        self.joining: str | None = None  # what they are to be told: the address, and the flag for the key
        if self.cluster.listen is None:
            return
        host, port = split_host(self.cluster.listen)
        sock = self._sockets["router"] = _listen(host, port, "--listen")
        self.joining = f"--join {join_host(self.cluster.address or host, sock.getsockname()[1])}"
        if self.cluster.cluster_key is None:
            path = Path(self.runtime, "cluster.key")
            path.touch(mode=0o600)
            path.write_text(f"{self.key}\n")
            self.joining += f" --key-file {path}"

    def wait_ready(self, timeout_s: float = START_S) -> None:
        """Return when every worker is up; DiptychError when a process ends before, or it takes too long."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            self._check(restart=False)
            answer = self._get("/workers")
            rows = (answer or {}).get("workers", [])
            up = {row["id"] for row in rows if row["state"] == "up"}
            if answer is not None and up >= {worker.name for worker in self.cluster.workers}:
                return
            time.sleep(POLL_S)
        raise DiptychError(f"the cluster was not ready after {timeout_s:g} s; what it printed says why")

    def watch(self) -> None:
        """Keep the cluster running until the router or the API process ends."""
        while True:
            time.sleep(POLL_S)
            self._check(restart=True)

    def stop(self) -> None:
        """Stop everything: the door first, then the workers, then the router."""
        with _undisturbed():
            Path(self.runtime, "stopping").touch()  # workers say less of it
            by_order = {"api": 0, "router": 2}
            for order in (0, 1, 2):
                group = [c for c in self.children if c.process and by_order.get(c.name, 1) == order]
                for child in group:
                    _signal(child, signal.SIGTERM)
                began = time.monotonic()
                if order == 1:
                    _wait_all(group, began + DRAIN_S)
                    for child in group:  # what is not empty by now leaves at once
                        _signal(child, signal.SIGTERM)
                _wait_all(group, began + STOP_S)
                for child in group:
                    _kill(child)
            self._folder.close()

    def _start(self, child: Child) -> None:
        fds = (self._sockets[child.name].fileno(),) if child.name in self._sockets else ()
        others = self.cluster.listen is not None
        orders = Orders(
            self.cluster, self.runtime, self.key, child.name, child.incarnation, fds[0] if fds else None,
            host=self.cluster.address if others else None,
            bind=split_host(self.cluster.listen)[0] if self.cluster.listen else None,
        )  # fmt: skip
        child.up, child.alive = orders.up, orders.alive
        child.process = subprocess.Popen(
            [sys.executable, "-m", child.module],
            stdin=subprocess.PIPE,
            env=os.environ | settings_of(self._cores(child.name)),
            pass_fds=fds,
        )
        assert child.process.stdin is not None
        child.process.stdin.write(msgspec.json.encode(orders))
        child.process.stdin.close()
        child.started, child.restart_at = time.monotonic(), None
        if child not in self.children:
            self.children.append(child)

    def _cores(self, name: str) -> tuple[int, ...]:
        return next((worker.cores for worker in self.cluster.workers if worker.name == name), ())

    def _wait_for_router(self) -> None:
        deadline = time.monotonic() + START_S
        while not os.path.exists(f"{self.runtime}/router.sock"):
            self._check(restart=False)
            if time.monotonic() > deadline:
                raise DiptychError("the router did not start")
            time.sleep(0.01)

    def _check(self, restart: bool) -> None:
        """Look at every child; restart workers that ended, if they may be, or raise DiptychError."""
        now = time.monotonic()
        self._check_life(now)
        for child in self.children:
            if child.restart_at is not None:
                if now >= child.restart_at:
                    self._start(child)
                continue
            if child.process is None or child.process.poll() is None:
                continue
            if child.process.returncode == 0 and restart and child.name not in ("router", "api"):
                self.on_event(f"{child.name} was drained and has left")
                child.process = None
                continue
            status = child.process.returncode
            why = f"{child.name} {_how(status)}"
            if not restart or child.name in ("router", "api"):
                kind = ConfigError if status == WRONG and not restart else DiptychError
                raise kind(why if status < 0 else f"{why}; what it printed says why")
            self._plan_restart(child, now, why)

    def _check_life(self, now: float) -> None:
        """Whom nothing works without must not only be there; DiptychError where one hangs."""
        for child in self.children:
            with contextlib.suppress(FileNotFoundError):
                touched = child.alive.stat().st_mtime if child.name in ("router", "api") else child.touched
                if touched != child.touched:
                    child.touched = touched
                    self._liveness.heard(child.name)
        for name, why in self._liveness.look(now):
            raise DiptychError(f"{name} is stuck: {why}")

    def _plan_restart(self, child: Child, now: float, why: str) -> None:
        up_s = time.time() - child.up.stat().st_mtime if child.up.exists() else None
        child.failures = 0 if up_s is not None and up_s >= SOON_S else child.failures + 1
        if up_s is not None:
            child.failures = min(child.failures, MOST_WAITED)
        if child.failures > MAX_FAILURES:
            self.on_event(f"{why}, {child.failures} times in a row; it is given up")
            child.process = None
            return
        wait_s = 0.1 * 2**child.failures if child.failures else 0.0
        self.on_event(f"{why}; a new one starts in {wait_s:.1f} s")
        child.incarnation += 1
        child.restart_at = now + wait_s

    def _get(self, path: str) -> Any:
        """JSON from the API, or None while it does not answer yet."""
        connection = http.client.HTTPConnection(self.cluster.host, self.port, timeout=5)
        try:
            key = self.cluster.api_key
            connection.request("GET", path, headers={"Authorization": f"Bearer {key}"} if key else {})
            response = connection.getresponse()
            body = response.read()
            return msgspec.json.decode(body) if response.status == 200 else None
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Being told to stop once more is no reason to stop halfway."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _listen(host: str, port: int, flag: str) -> socket.socket:
    """Bind before anything is started: a port in use is said at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen(2048)
    except OSError as error:
        sock.close()
        wrong = flag if flag == "--listen" or error.errno in (errno.EADDRINUSE, errno.EACCES) else "--host"
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}; choose another {wrong}") from None
    return sock


def _how(status: int) -> str:
    """How a process ended, in words."""
    if status >= 0:
        return f"ended with status {status}"
    return f"was killed by signal {-status}{' (out of memory?)' if status == -signal.SIGKILL else ''}"


def _signal(child: Child, number: int) -> None:
    if child.process is not None and child.process.poll() is None:
        child.process.send_signal(number)


def _wait_all(children: list[Child], deadline: float) -> None:
    for child in children:
        with contextlib.suppress(subprocess.TimeoutExpired):
            assert child.process is not None
            child.process.wait(max(deadline - time.monotonic(), 0.05))


def _kill(child: Child) -> None:
    if child.process is not None and child.process.poll() is None:
        child.process.kill()
        child.process.wait()
