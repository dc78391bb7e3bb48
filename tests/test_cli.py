"""The command line: what is wrong with it is said in a line that names what to change, with status 2."""

import logging
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from diptych import cli
from diptych.config import load_cluster


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """A command sets up the log and the signals of its process."""
    root, handlers, level = logging.getLogger(), list(logging.getLogger().handlers), logging.getLogger().level
    signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for number, handler in signals.items():
        signal.signal(number, handler)


WRONG: list[tuple[list[str], str]] = [
    (["serve", "--port", "99999"], "'port' must be at most 65535"),
    (["serve", "--port", "-1"], "'port' must be at least 0"),
    (["serve", "{folder}"], "--model {folder}"),
    (["serve", "org/name"], "org/name: no such file; a model is given with a flag: --model org/name"),
    (["serve", "--cores", "98765", "--port", "0"], "the cores 98765, and there are "),
    (["serve", "{cores}", "--port", "0"], "the cores 98765, and there are "),
    (["serve", "--journal", "/proc/x", "--port", "0"], "no journal can be kept in /proc/x: "),
    (["serve", "--host", "192.0.2.1", "--port", "0"], "choose another --host"),
    (["serve", "--prefill", "-1", "--decode", "1"], "--prefill is -1; it must be at least 0"),
    (["serve", "--model", "/nope/x", "--port", "0"], "/nope/x: no such folder"),
    (["serve", "--kv-memory", "..."], "'...' is not a size"),
    (["serve", "{lease}"], "'lease' must be more than 0"),
    (["serve", "{bytes}"], "is no TOML"),
    (["serve", "/proc/self/mem"], "/proc/self/mem: "),
]


@pytest.mark.parametrize(("flags", "expected"), WRONG, ids=[" ".join(flags) for flags, _ in WRONG])
def test_what_is_wrong_is_one_line(
    flags: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lease.toml").write_text("lease = -1")
    (tmp_path / "cores.toml").write_text('[[worker]]\nrole = "mixed"\ncores = [98765]')
    (tmp_path / "bytes.toml").write_bytes(b"\xff")
    files = {"folder": tmp_path, **{name: tmp_path / f"{name}.toml" for name in ("lease", "cores", "bytes")}}
    assert cli.main([flag.format(**files) for flag in flags]) == 2
    said = capsys.readouterr().err
    assert said.startswith("diptych: ") and said.count("\n") == 1, said
    assert expected.format(**files) in said


@pytest.mark.parametrize(
    "flags", [["simulate", "--kv-bytes", "0"], ["simulate", "--kv-bytes", "-5"], ["serve", "--mix", "1"]]
)
def test_flags_that_are_refused(flags: list[str]) -> None:
    """Abbreviations, too: a flag that comes later would change what they mean."""
    with pytest.raises(SystemExit) as caught:
        cli.main(flags)
    assert caught.value.code == 2


def test_a_lease_that_ends_before_a_hang_is_noticed_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    cli._warn_of_leases(load_cluster(None, {"stuck": 10, "lease": 11}))
    assert not caplog.messages
    cli._warn_of_leases(load_cluster(None, {"stuck": 10, "lease": 10}))
    assert "stuck (10 s) is not below lease (10 s)" in caplog.text
