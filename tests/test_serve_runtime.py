"""Folders of clusters: made, held, and taken away once nobody holds them."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from diptych.serve.runtime import Runtime, sweep

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_folder_is_private_and_goes_with_its_owner(place: Path) -> None:
    made = Runtime()
    Path(made.path, "router.sock").touch()
    assert Path(made.path).parent == place and os.stat(made.path).st_mode & 0o777 == 0o700
    sweep()
    assert os.listdir(made.path), "it is held"
    made.close()
    assert not list(place.iterdir())


def test_what_a_killed_one_left_is_taken_away(place: Path) -> None:
    code = "import os; from diptych.serve.runtime import Runtime; r = Runtime(); os.kill(os.getpid(), 9)"
    environment = os.environ | {"TMPDIR": str(place), "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], env=environment)
    assert len(list(place.iterdir())) == 1
    Runtime().close()
    assert not list(place.iterdir())


def test_what_is_not_surely_ours_is_left_alone(place: Path) -> None:
    (place / "diptych-plain").mkdir()  # of whoever: nobody has ever held it
    (place / "elsewhere").mkdir()
    (place / "elsewhere" / "held").touch()
    (place / "diptych-link").symlink_to(place / "elsewhere")
    (place / "diptych-loop").mkdir()
    (place / "diptych-loop" / "held").symlink_to(place / "elsewhere" / "held")
    (place / "diptych-file").touch()
    before = sorted(place.rglob("*"))
    sweep()
    assert sorted(place.rglob("*")) == before
