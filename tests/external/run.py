"""The field's own clients against a live server: python tests/external/run.py [--only NAME ...] [--folder FOLDER]

Sets up an environment of its own beside the project's (its packages are seen there, too), starts clusters, runs each
client's script, and prints a row for each scenario. Exit status 1 where one failed. `npm` packages need Node 20.
Not part of the suite: it installs hundreds of megabytes and takes some minutes.
"""

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SMALL = {"engine": "paced", "mixed": 1, "kv_memory": 512 * 64, "paced": {"base_ms": 0.2, "new_token_us": 1.0}}


def main() -> int:
    """Set up, run, report."""
    parser = argparse.ArgumentParser(description="The field's own clients against a live server.")
    parser.add_argument("--only", nargs="+", choices=sorted(CLIENTS), default=list(CLIENTS))
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "diptych-clients")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    python = set_up_python(folder)
    if "npm" in arguments.only:
        set_up_node(folder)
    results = {name: CLIENTS[name](folder, python) for name in arguments.only}
    print("".join(f"\n{'PASS' if status == 0 else 'FAIL'}  {name}" for name, status in results.items()))
    return 0 if not any(results.values()) else 1


def set_up_python(folder: Path) -> Path:
    """An environment with the clients, which sees the packages of the one that runs this."""
    wanted = (HERE / "requirements.txt").read_text()
    python, stamp = folder / "venv/bin/python", folder / "venv/installed.txt"
    if not stamp.is_file() or stamp.read_text() != wanted:
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
        site = subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
            check=True, capture_output=True, text=True,
        ).stdout.strip()  # fmt: skip
        Path(site, "project.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n")
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "-c", ROOT / "constraints.txt", "-r", HERE / "requirements.txt"], check=True)
        stamp.write_text(wanted)
    return python


def set_up_node(folder: Path) -> None:
    """The npm packages, with the script beside them: that is where Node looks for them."""
    for name in ("package.json", "package-lock.json", "with_openai.mjs"):
        shutil.copy(HERE / name, folder / name)
    subprocess.run(["npm", "ci", "--silent", "--no-audit", "--no-fund"], cwd=folder, check=True)


def against(command: list[str | Path], folder: Path, flags: dict[str, object]) -> int:
    """Run a command, with URL replaced by that of a fresh cluster."""
    from diptych.config import load_cluster
    from diptych.serve.supervisor import Supervisor

    with Supervisor(load_cluster(None, {"port": 0, "log_level": "error", **flags})) as cluster:
        cluster.wait_ready()
        line = [str(part).replace("URL", cluster.url) for part in command]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment |= {"HF_HOME": str(folder / "huggingface"), "OMP_NUM_THREADS": "1"}
        return subprocess.run(line, cwd=folder, env=environment).returncode


def _script(name: str) -> Callable[[Path, Path], int]:
    return lambda folder, python: against([python, HERE / name, "URL"], folder, {"prefill": 1, "decode": 1})


def _npm(folder: Path, python: Path) -> int:
    return against(["node", folder / "with_openai.mjs", "URL"], folder, {"prefill": 1, "decode": 1})


def _schemathesis(folder: Path, python: Path) -> int:
    """Requests made from the OpenAPI document, right and wrong ones; answers must be as it says.

    What a schema cannot say (a prompt or messages, a model that is here) may be refused: that check is left out.
    """
    command: list[str | Path] = [python.parent / "schemathesis", "run", "URL/openapi.json", "--checks", "all"]
    command += ["--exclude-checks", "positive_data_acceptance"]
    command += ["--max-examples", "60", "--generation-deterministic", "--request-timeout", "20", "--no-color"]
    return against([*command, "--continue-on-failure"], folder, SMALL)


CLIENTS: dict[str, Callable[[Path, Path], int]] = {
    "openai": _script("with_openai.py"),
    "langchain": _script("with_langchain.py"),
    "npm": _npm,
    "lm-eval": _script("with_lm_eval.py"),
    "schemathesis": _schemathesis,
}

if __name__ == "__main__":
    sys.exit(main())
