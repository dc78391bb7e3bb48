"""`make wheel`: what it makes runs where there is no compiler, and says for which machines it is."""

import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("setuptools")

from diptych.engine import kernels
from diptych.transfer.native import build

ROOT = Path(__file__).parent.parent
pytestmark = [
    pytest.mark.skipif(build.find_compiler() is None, reason="no C++ compiler here"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="one level alone is for other machines"),
    pytest.mark.skipif(shutil.which("make") is None, reason="no make here"),
    pytest.mark.skipif(not Path(sys.prefix, "bin/pip").exists(), reason="no pip in this environment"),
]
LOOK = """
import json, sys
from diptych.engine import kernels
from diptych.transfer import native
from diptych.transfer.native import build
assert build.find_compiler() is None and build.__file__.startswith(sys.argv[1]), build.__file__
libraries = {level: kernels.library(level) for level in kernels.levels_here()}
assert all(libraries.values()) and native.library(), libraries
print(*[library._name for library in [*libraries.values(), native.library()]], sep="\\n")
"""


def run(command: list[str], **kwargs: object) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, **kwargs)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout)


def test_a_wheel_has_all_libraries_and_finds_them_without_a_compiler(tmp_path: Path) -> None:
    """Those that other tests use come from the cache of builds, so that little is compiled here."""
    outer = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    settings = {"VENV": sys.prefix, "WHEEL": tmp_path / "copy", "DIST": tmp_path / "dist"}
    arguments = [f"{name}={value}" for name, value in settings.items()]
    run(["make", "-C", str(ROOT), "-o", f"{sys.prefix}/.installed", "wheel", *arguments], env=outer)

    (wheel,) = (tmp_path / "dist").iterdir()
    assert wheel.name.endswith("-py3-none-linux_x86_64.whl")
    with zipfile.ZipFile(wheel) as packed:
        names = [name for name in packed.namelist() if name.endswith(".so")]
    found = {re.sub(r"-[0-9a-f]+\.so$", "", Path(name).name) for name in names}
    assert len(names) == len(found) and found <= {"copy", *(f"kernels-{level}" for level in kernels.LEVELS)}
    assert found >= {"copy", *(f"kernels-{level}" for level in kernels.levels_here())}, "a compiler may be too old"

    site, nothing = tmp_path / "site", tmp_path / "nothing"
    nothing.mkdir()
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]
    run([sys.executable, *install, "--target", str(site), str(wheel)], env=outer)
    bare = outer | {"PATH": str(nothing), "PYTHONPATH": str(site), "XDG_CACHE_HOME": str(nothing)}
    loaded = run([sys.executable, "-c", LOOK, str(site)], env=bare, cwd=nothing).split()
    assert len(loaded) == 1 + len(kernels.levels_here()) and all(Path(name).is_relative_to(site) for name in loaded)
    assert list(nothing.iterdir()) == []
