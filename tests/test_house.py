"""The rules of the house: what may import what, sizes, names, docstrings, and documents that keep up with the code.

Everything is read from the source, so a rule holds for a file the moment it is there.
"""

import argparse
import ast
import dataclasses
import re
import resource
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import msgspec
import pytest

from diptych import cli, config, errors, journal
from diptych.policy import messages
from diptych.sim import workload

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "diptych"
FILES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    """The dotted name of a file of the package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


@cache
def tree(path: Path) -> ast.Module:
    """A file, parsed."""
    return ast.parse(path.read_text(), str(path))


def imported(path: Path) -> Iterator[str]:
    """The modules a file imports anywhere in it, functions and TYPE_CHECKING included; ours down to the file."""
    for node in ast.walk(tree(path)):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(level=0, module=str(module), names=names):
                for alias in names:
                    full = f"{module}.{alias.name}"
                    yield full if full in MODULES else module
            case ast.ImportFrom():
                pytest.fail(f"{path}:{node.lineno}: relative import")


def inside(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def modules_of(part: str) -> dict[str, Path]:
    """The files of `diptych.<part>`."""
    return {name: path for name, path in MODULES.items() if inside(name, f"diptych.{part}")}


def calls(path: Path) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree(path)) if isinstance(node, ast.Call))


# --- imports -------------------------------------------------------------------------------------------------------

FACTS = {"policy", "journal", "modelfacts", "linkrates", "errors"}
EVERYTHING = {name.split(".")[1] for name in MODULES if "." in name}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "policy": set(),
    "demo": set(),
    "journal": {"policy", "errors"},
    "linkrates": {"errors"},
    "units": {"errors"},
    "wording": set(),
    "keys": {"errors"},
    "modelfacts": {"policy", "errors"},
    "transfer": FACTS,
    "sim": FACTS,
    # An executor computes in the pool that the transport exports: memory and its layout are the one thing they share.
    # Both have C++, and one way to compile it.
    "engine": FACTS | {"transfer.pool", "transfer.layout", "transfer.native.build"},
    # A paced model's costs are part of a cluster's description; the module knows neither torch nor a process. Its
    # vocabulary is, by default, that of a tokenizer.
    "config": {"policy", "errors", "linkrates", "units", "wording", "keys", "engine.paced", "modelfacts"},
    "serve": EVERYTHING - {"sim", "plan", "bench", "cli", "offline"},
    "offline": EVERYTHING - {"sim", "plan", "bench", "cli"},
    "plan": EVERYTHING - {"cli"},
    "bench": EVERYTHING - {"cli"},
    "web": set(),
    "cli": EVERYTHING,
}
"""What each part may import of ours, besides itself. `__init__.py` of the package only names things."""


@pytest.mark.parametrize("part", sorted(EVERYTHING))
def test_layers(part: str) -> None:
    """Every part imports only what stands below it."""
    assert part in MAY_IMPORT, f"a new part, {part}: say here what it may import"
    allowed = [f"diptych.{name}" for name in (*MAY_IMPORT[part], part)]
    wrong = [
        f"{name} imports {target}"
        for name, path in modules_of(part).items()
        for target in imported(path)
        if inside(target, "diptych") and target != "diptych" and not any(inside(target, a) for a in allowed)
    ]
    assert not wrong


IMPURE = {
    "asyncio", "concurrent", "ctypes", "datetime", "io", "logging", "multiprocessing", "os", "pathlib", "queue",
    "secrets", "select", "selectors", "signal", "socket", "subprocess", "sys", "tempfile", "threading", "time", "uuid",
}  # fmt: skip
"""Standard library modules with which a decision could depend on more than its events."""


@pytest.mark.parametrize("path", modules_of("policy").values(), ids=lambda path: path.stem)
def test_policy_is_pure(path: Path) -> None:
    """A decision depends on events alone: no clock, no environment, no input or output, no unseeded chance."""
    names = {target.partition(".")[0] for target in imported(path)} - {"diptych"}
    assert names <= set(sys.stdlib_module_names)
    assert not names & IMPURE
    assert_seeded(path)
    called = {call.func.id for call in calls(path) if isinstance(call.func, ast.Name)}
    assert not called & {"open", "print", "input", "hash", "id"}  # the last two differ from process to process


@pytest.mark.parametrize("path", modules_of("sim").values(), ids=lambda path: path.stem)
def test_the_simulator_has_no_clock_of_its_own(path: Path) -> None:
    """Same seed, same bytes: virtual time only, and chance only from a seed."""
    names = {target.partition(".")[0] for target in imported(path)}
    assert not names & (IMPURE - {"pathlib"} | {"torch", "transformers"})
    assert_seeded(path)


def assert_seeded(path: Path) -> None:
    """Chance comes from `Random(seed)` and from nowhere else."""
    for node in ast.walk(tree(path)):
        match node:
            case ast.Import(names=names):
                assert "random" not in {alias.name for alias in names}, f"{path}:{node.lineno}"
            case ast.ImportFrom(module="random", names=names):
                assert {alias.name for alias in names} == {"Random"}, f"{path}:{node.lineno}"
            case ast.Call(func=ast.Name(id="Random")):
                assert node.args, f"{path}:{node.lineno}: Random without a seed"


def test_drivers_are_named_after_what_they_drive() -> None:
    """`policy/router.py` is driven by `serve/router.py`, and only there; so with every object that decides."""
    deciders = {path.stem for path in modules_of("policy").values() if "on" in methods(path)}
    drivers = {
        path.stem
        for path in modules_of("serve").values()
        for call in calls(path)
        if isinstance(call.func, ast.Attribute) and call.func.attr == "on" and "policy" in ast.unparse(call.func.value)
    }
    assert deciders == drivers == {"router", "worker"}


def methods(path: Path) -> set[str]:
    classes = [node for node in tree(path).body if isinstance(node, ast.ClassDef)]
    return {node.name for each in classes for node in each.body if isinstance(node, ast.FunctionDef)}


def test_no_policy_is_told_the_length_of_an_answer() -> None:
    """The simulator's arrivals carry it; nothing that a policy hears, or has, does."""
    words = {
        node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else node.arg
        for path in modules_of("policy").values()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Name | ast.Attribute | ast.arg)
    }
    assert "output_len" in {field.name for field in dataclasses.fields(workload.Arrival)}
    assert "output_len" not in words
    assert {field.name for field in dataclasses.fields(messages.Submitted)} == {
        "request", "num_prompt", "max_new", "hashes", "priority",
    }  # fmt: skip
    assert {field.name for field in dataclasses.fields(messages.Place)} == {
        "worker", "rid", "part", "peer", "num_prompt", "num_tokens", "max_new", "hashes", "priority", "order",
    }  # fmt: skip


RUNS_WHAT_IT_READS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml"}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_nothing_runs_what_it_reads(path: Path) -> None:
    """No format that can carry code, and no evaluation of strings."""
    assert not {target.partition(".")[0] for target in imported(path)} & RUNS_WHAT_IT_READS
    for call in calls(path):
        name = ast.unparse(call.func)
        assert name not in ("eval", "exec", "torch.load", "os.system"), f"line {call.lineno}: {name}"
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert keywords.get("allow_pickle", "False") == "False", f"line {call.lineno}"
        assert keywords.get("shell", "False") == "False", f"line {call.lineno}"


def loaded_after(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after a statement."""
    code = f"{statement}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.parametrize("module", ["api_process", "router_process", "supervisor"])
def test_processes_that_do_not_compute_load_no_torch(module: str) -> None:
    assert not loaded_after(f"import diptych.serve.{module}") & {"torch", "transformers"}


def test_the_command_line_starts_at_once() -> None:
    """It loads what a command needs when the command runs."""
    heavy = {"torch", "transformers", "numpy", "starlette", "uvicorn", "tokenizers"}
    assert not loaded_after("import diptych.cli") & heavy
    command = [sys.executable, "-c", "from diptych.cli import main; main(['--help'])"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0  # the processor's time
    assert done.stdout.startswith("usage: diptych")


# --- sizes and names -----------------------------------------------------------------------------------------------


def num_lines(node: ast.AST) -> int:
    return node.end_lineno - node.lineno + 1  # type: ignore[attr-defined]


FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree(path)) if isinstance(node, FUNCTION)]


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_sizes(path: Path) -> None:
    """Files under 400 lines, classes of at most 300, functions of at most 60."""
    length = len(path.read_text().splitlines())
    too_long = [f"{length} lines"] if length >= 400 else []
    for node in ast.walk(tree(path)):
        limit = 300 if isinstance(node, ast.ClassDef) else 60
        if isinstance(node, FUNCTION | ast.ClassDef) and num_lines(node) > limit:
            too_long.append(f"{node.name}: {num_lines(node)} lines")
    assert not too_long


def test_most_functions_are_short() -> None:
    """Half of all functions have fewer than ten lines."""
    assert statistics.median(num_lines(node) for path in FILES for node in functions(path)) < 10


def test_no_file_is_a_drawer() -> None:
    """A file has a subject; these names say that it has none."""
    assert not {path.stem for path in FILES} & {"utils", "util", "helpers", "common", "misc"}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_every_module_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(tree(path)), "no docstring"


# --- documents -----------------------------------------------------------------------------------------------------


def sections(path: Path, heading: str = "## ") -> dict[str, str]:
    """A Markdown file's sections by their titles."""
    chunks = re.split(rf"^{heading}", path.read_text(), flags=re.MULTILINE)[1:]
    return {title.strip(): body for title, _, body in (chunk.partition("\n") for chunk in chunks)}


def subcommands() -> dict[str, argparse.ArgumentParser]:
    parser = cli._parser()
    (action,) = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return dict(action.choices)


def first_column(text: str) -> set[str]:
    """What a document's tables list: every code span of each row's first cell, without its value (`--port N`)."""
    cells = [re.split(r"(?<!\\)\|", line)[1] for line in text.splitlines() if line.startswith("| `")]
    return {span.split()[0] for cell in cells for span in re.findall(r"`([^`]+)`", cell)}


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    """What a parser takes: its flags, and its arguments by the name that help shows."""
    actions = [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]
    return {flag for action in actions for flag in action.option_strings or [str(action.metavar or action.dest)]}


def test_every_command_is_documented() -> None:
    documented = {title.split()[1].strip("`") for title in sections(ROOT / "docs/cli.md") if "diptych " in title}
    assert documented == set(subcommands())


@pytest.mark.parametrize("command", subcommands())
def test_every_flag_is_documented(command: str) -> None:
    """And every documented flag is there. A load's are the same in several commands, and have a table of their own."""
    found = sections(ROOT / "docs/cli.md")
    text = found[f"`diptych {command}`"]
    documented = first_column(text) | (first_column(found["A load"]) if "(#a-load)" in text else set())
    assert documented == flags_of(subcommands()[command])


@pytest.mark.parametrize(
    ("title", "table"),
    [
        ("For the whole cluster", config._File),
        ("For every worker, or one", config._Defaults),
        ("`[[worker]]`", config._Worker),
        ("`[router]`", config._Router),
        ("`[[link]]`", config._Link),
        ("`[paced]`", config._Paced),
    ],
)
def test_every_key_of_the_cluster_file_is_documented(title: str, table: type) -> None:
    """And every documented key is there."""
    keys = {field.encode_name for field in msgspec.structs.fields(table)}
    inherited = {field.encode_name for field in msgspec.structs.fields(config._Defaults)}
    tables = {"worker", "router", "paced"} if table is config._File else set()
    documented = first_column(sections(ROOT / "docs/cli.md", "### ")[title])
    assert documented == (keys if table is config._Defaults else keys - inherited) - tables


def test_the_examples_of_cluster_files_work(tmp_path: Path) -> None:
    examples = re.findall(r"```toml\n(.*?)```", (ROOT / "docs/cli.md").read_text(), flags=re.DOTALL)
    assert len(examples) >= 4
    for example in examples:
        (tmp_path / "cluster.toml").write_text(example)
        assert config.load_cluster(tmp_path / "cluster.toml", {}).workers


def test_every_message_has_its_row() -> None:
    """`docs/architecture.md` says who says what to whom, for all of both vocabularies."""
    rows = first_column(sections(ROOT / "docs/architecture.md")["Two vocabularies"])
    assert rows == {kind.__name__ for kind in journal._POLICY_TYPES}


def test_every_invariant_names_tests_that_exist() -> None:
    found = sections(ROOT / "docs/invariants.md")
    assert [title.split(".")[0] for title in found] == [str(i) for i in range(1, 17)]
    references = {title: re.findall(r"`(tests/\w+\.py)::(\w+)`", body) for title, body in found.items()}
    assert not [title for title, named in references.items() if not named], "without a test"
    for file, test in {reference for named in references.values() for reference in named}:
        assert test in {node.name for node in functions(ROOT / file)}, f"{file}::{test}"


def test_the_tree_of_errors_is_drawn_in_full() -> None:
    """The docstring of `errors.py` has every error, with its HTTP status."""
    drawn = dict(re.findall(r"(\w+) +([45]\d\d)  ", errors.__doc__ or ""))
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.DiptychError)]
    assert drawn == {kind.__name__: str(kind.status) for kind in kinds}


# --- building ------------------------------------------------------------------------------------------------------


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_dependency_is_pinned() -> None:
    """`constraints.txt` has exact versions, and one for everything `pyproject.toml` names."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = dict(re.fullmatch(r"([\w.-]+)==([\w.]+)", line).groups() for line in lines)  # type: ignore[union-attr]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    missing = {canonical(re.split(r"[<>=!;\[ ]", requirement)[0]) for requirement in wanted} - set(map(canonical, pins))
    assert not missing


def test_make_has_the_usual_targets() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {"help", "install", "serve", "test", "lint", "clean"} <= targets


def test_ci_can_be_run() -> None:
    assert (ROOT / ".ci/run").stat().st_mode & 0o111
