"""Three hosts over TCP: a router with a prefill worker, and decode workers that join and drain under load.

The hosts are network namespaces of this machine. No stream may be cut, and every answer is the model's.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hosts import Host, hosts, said, why_none
from reference import Reference

from diptych.config import DEMO, load_cluster
from diptych.engine.paced import oracle

pytestmark = pytest.mark.skipif(bool(why_none()), reason=why_none() or "-")

KEY = "a key of the test, nobody else's"
PACED = """
engine = "paced"
kv_memory = "512KiB"
chunk = 128
lease = 5.0
[paced]
base_ms = 4.0
new_token_us = 20
vocab = 300
[[worker]]
role = "prefill"
"""
TORCH = """
kv_memory = "16MiB"
chunk = 128
[[worker]]
role = "prefill"
"""
CALL = """
import sys, urllib.request as u
kind = {"content-type": "application/json"}
print(u.urlopen(u.Request(sys.argv[1], sys.argv[2].encode() or None, kind), timeout=10).read().decode())
"""
LOAD = Path(__file__).with_name("load_from_a_host.py")


class Field:
    """The hosts of one test, and all that runs on them."""

    def __init__(self, made: list[Host], folder: Path):
        self.first, self.others = made[0], made[1:]
        self.url = f"http://{self.first.address}:8000"
        self.processes: list[subprocess.Popen[bytes]] = []
        self._folder = folder
        (folder / "key").write_text(KEY)

    def serve(self, topology: str, *flags: str) -> None:
        """The router, the API and a prefill worker on the first host."""
        (self._folder / "cluster.toml").write_text(topology)
        where = ("--listen", f"{self.first.address}:7000", "--host", self.first.address)
        process = self._start(
            self.first, "serve", "serve", str(self._folder / "cluster.toml"), *where, *flags, *self._key()
        )
        said(self.log("serve"), "ready after", process)

    def join(self, host: Host, name: str, *flags: str) -> "subprocess.Popen[bytes]":
        """A decode worker on another host, up."""
        joined = ("--join", f"{self.first.address}:7000", "--role", "decode", "--name", name)
        process = self._start(host, name, "worker", *joined, *flags, *self._key())
        said(self.log(name), ": up", process)
        return process

    def load(self, concurrency: int, vocab: int, max_new: int) -> None:
        """Begin to ask; `answers` has what came."""
        with self.log("load").open("wb") as out, self.log("load errors").open("wb") as errors:
            command = [sys.executable, str(LOAD), self.url, str(concurrency), str(vocab), str(max_new)]
            self.client = subprocess.Popen(
                ["ip", "netns", "exec", self.first.name, *command], stdin=subprocess.PIPE, stdout=out, stderr=errors
            )
        self.processes.append(self.client)

    def finish_load(self) -> list[dict[str, Any]]:
        """Ask for nothing more, and wait for what was asked."""
        self.client.communicate(timeout=60)
        assert self.client.returncode == 0, self.log("load errors").read_text()
        return self.answers()

    def answers(self) -> list[dict[str, Any]]:
        """All that have ended."""
        return [json.loads(line) for line in self.log("load").read_text().splitlines(keepends=True) if line[-1] == "\n"]

    def until(self, true: Callable[[], bool], limit_s: float = 60.0) -> None:
        """Wait for something that other processes bring about."""
        deadline = time.monotonic() + limit_s
        while not true():
            assert self.client.poll() is None, self.log("load errors").read_text()
            assert time.monotonic() < deadline, (self.rows(), self.log("serve").read_text())
            time.sleep(0.05)

    def rows(self) -> dict[str, dict[str, Any]]:
        return {row["id"]: row for row in self.call("/workers")["workers"]}

    def call(self, path: str, body: str = "") -> Any:
        """Speak to the API from the first host."""
        command = ["ip", "netns", "exec", self.first.name, sys.executable, "-S", "-c", CALL, self.url + path, body]
        return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)

    def log(self, name: str) -> Path:
        return self._folder / f"{name}.log"

    def stop(self) -> None:
        for process in reversed(self.processes):
            process.terminate()
        for process in self.processes:
            if process.stdin is not None:
                process.stdin.close()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _key(self) -> tuple[str, str]:
        return "--key-file", str(self._folder / "key")

    def _start(self, host: Host, name: str, *arguments: str) -> "subprocess.Popen[bytes]":
        process = host.start(*arguments, log=self.log(name))
        self.processes.append(process)
        return process


@pytest.fixture
def field(tmp_path: Path) -> Iterator[Field]:
    with hosts(3) as made:
        field = Field(made, tmp_path)
        try:
            yield field
        finally:
            field.stop()


def join_and_drain_under_load(field: Field, topology: str, concurrency: int, vocab: int, max_new: int) -> Any:
    """Load throughout: one decode worker, then two, then only the second. Returns the answers."""
    field.serve(topology, "--transport", "tcp")
    first = field.join(field.others[0], "first")
    field.load(concurrency, vocab, max_new)
    field.until(lambda: len(field.answers()) >= concurrency)
    field.join(field.others[1], "second")
    field.until(lambda: field.rows()["second"]["steps"] > max_new)
    field.until(lambda: field.rows()["first"]["running"] > 0)
    drained = field.call("/workers/first/drain", "{}")
    assert drained["state"] == "draining"
    assert first.wait(60) == 0, field.log("first").read_text()
    before = len(field.answers())
    field.until(lambda: len(field.answers()) >= before + concurrency)
    rows = field.rows()
    assert set(rows) == {"p0", "second"} and rows["second"]["kv"]["bytes"] > 0
    answers = field.finish_load()
    for answer in answers:
        assert (answer["status"], answer["error"], answer["reason"]) == (200, None, "length"), answer
        assert len(answer["tokens"]) == max_new
    totals = field.call("/health")["totals"]
    assert totals["finished"] == totals["submitted"] == len(answers)
    assert field.log("second").read_text().count("\n") == 3, field.log("second").read_text()
    return answers


def test_a_worker_joins_and_one_drains_under_load(field: Field, tmp_path: Path) -> None:
    answers = join_and_drain_under_load(field, PACED, concurrency=12, vocab=300, max_new=60)
    model = load_cluster(tmp_path / "cluster.toml", {"listen": "10.77.0.1:7000"}).paced
    for answer in answers:
        assert answer["tokens"] == oracle(answer["prompt"], 60, model)
    assert len(answers) > 40


def test_the_same_with_a_real_model(field: Field) -> None:
    answers = join_and_drain_under_load(field, TORCH, concurrency=3, vocab=500, max_new=24)
    reference = Reference(DEMO)
    for answer in answers[:4] + answers[-4:]:
        reference.check(reference.greedy(answer["prompt"], 24), answer["tokens"], "over TCP")


def test_who_does_not_fit_or_does_not_know_the_key_stays_out(field: Field, tmp_path: Path) -> None:
    field.serve(PACED)
    (tmp_path / "wrong").write_text("another key, as long as the first")
    joined = ("worker", "--join", f"{field.first.address}:7000", "--role", "decode")
    other = field.others[0]
    for log, status, words, flags in (
        ("dtype", 2, "dtype is 'bfloat16' there and 'float32' in this cluster", ("--dtype", "bfloat16", *field._key())),
        ("name", 2, "a worker p0 is here already", ("--name", "p0", *field._key())),
        ("key", 1, "do both sides have the same key?", ("--key-file", str(tmp_path / "wrong"))),
    ):
        process = other.start(*joined, *flags, log=field.log(log))
        assert process.wait(30) == status
        assert words in field.log(log).read_text()
    process = field._start(other, "late", *joined, *field._key())
    said(field.log("late"), ": up", process)
    field.processes[0].terminate()
    assert process.wait(30) == 1 and "the router is gone" in field.log("late").read_text()
