"""The examples run as their headers say, against one live cluster."""

import ast
import importlib.util
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from clusters import live

from diptych import cli
from diptych.config import load_cluster
from diptych.policy.messages import Role

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with live(prefill=1, decode=1) as supervisor:
        yield supervisor.url


def said(name: str, *arguments: str) -> str:
    """What an example prints."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *arguments],
        env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_openai_client(url: str) -> None:
    whole, *streamed = said("openai_client.py", url).splitlines()
    assert len(whole.split()) > 8 and len(" ".join(streamed).split()) > 8


def test_structured_output(url: str) -> None:
    answer = ast.literal_eval(said("structured_output.py", url))
    assert answer["animal"] in ("fox", "hen", "owl") and isinstance(answer["hungry"], bool) and 2 <= answer["legs"] <= 4


def test_prefix_cache(url: str) -> None:
    (total, none), (again, cached) = (
        map(int, found) for found in re.findall(r"(\d+) prompt tokens, (\d+) of them", said("prefix_cache.py", url))
    )
    assert none == 0 and total == again and 0.9 * total < cached < total


def test_waterfall(url: str) -> None:
    lines = said("waterfall.py", url).splitlines()
    parts = [float(line.split()[1]) for line in lines if line.startswith("  ")]
    wholes = [float(line.split()[-2]) for line in lines if line.endswith(" ms") and ": " in line and line[0] == "t"]
    assert len(parts) == 12 and abs(sum(parts) - sum(wholes)) < 0.2
    assert "MB of KV from p0 to d0 over shm" in "".join(lines)


def test_langchain_client(url: str) -> None:
    if importlib.util.find_spec("langchain_openai") is None:
        pytest.skip("langchain-openai is not installed")
    assert len(said("langchain_client.py", url).split()) > 20


def test_offline(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["offline.py"])
    runpy.run_path(str(EXAMPLES / "offline.py"))
    assert capsys.readouterr().out.count("24 tokens]") == 2


def test_compare_modes(tmp_path: Path) -> None:
    """It finds its command, and its flags are those that there are."""
    done = subprocess.run(
        ["sh", EXAMPLES / "compare_modes.sh", "--rounds", "4"],
        env=os.environ | {"DIPTYCH": "echo"}, cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    arguments = cli._parser().parse_args(done.stdout.split())
    assert (arguments.rate, arguments.rounds) == (14, 4) and (tmp_path / arguments.out).parent.is_dir()


@pytest.mark.parametrize("file", sorted((EXAMPLES / "clusters").glob("*.toml")), ids=lambda file: file.stem)
def test_clusters(file: Path) -> None:
    cluster = load_cluster(file, {})
    roles = {worker.role for worker in cluster.workers}
    pair, mixed = {Role.PREFILL, Role.DECODE}, {Role.MIXED}
    assert roles == {"unified": mixed, "chunked": mixed, "disaggregated": pair, "hybrid": pair | mixed}[file.stem]


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.py")), ids=lambda file: file.stem)
def test_every_example_says_how_to_run_it(file: Path) -> None:
    assert f"python examples/{file.name}" in (ast.get_docstring(ast.parse(file.read_text())) or "")
