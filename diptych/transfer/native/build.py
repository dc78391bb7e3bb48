"""Finds a compiled library, or compiles it once per machine, source and compiler.

Looked for next to the source (a wheel, as `make wheel` makes it with `--in-place`), then in a cache folder
(`$XDG_CACHE_HOME/diptych/native` or `~/.cache/diptych/native`). A build goes to a temporary name and is renamed, under
a file lock: workers that start together compile once, and nobody loads half a file. The copy routines (and the
same over sockets) are one `Target`, the engine's attention (`engine/kernels.py`) others.

Not responsible for what a library does (`copy.cpp`) nor for doing without it (`__init__.py`).
"""

import contextlib
import fcntl
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

SOURCE = Path(__file__).with_name("copy.cpp")
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fno-exceptions", "-fno-rtti")
BUILD_S = 120.0


class BuildError(Exception):
    """Why there is no library; never leaves this package."""


@dataclass(frozen=True, slots=True)
class Target:
    """A library to be: one source, the headers it includes, and how to compile it."""

    name: str  # of the file: libraries of one source differ in it
    source: Path
    headers: tuple[Path, ...] = ()
    flags: tuple[str, ...] = FLAGS
    attempts: tuple[tuple[str, ...], ...] = ((), ("-DDIPTYCH_PORTABLE",))  # further flags, until one compiles


COPY = Target(
    "copy",
    SOURCE,
    (SOURCE.with_name("sockets.h"), SOURCE.with_name("codec.h")),
    flags=(*FLAGS, "-ffp-contract=off"),  # so that every CPU encodes to the same bytes
)


def find_or_build(target: Target = COPY) -> Path:
    """The library's path, compiling it if need be (a few seconds). Raises BuildError or OSError."""
    prebuilt = _in_place(target)
    if prebuilt.exists():
        return prebuilt
    compiler = find_compiler()
    if compiler is None:
        raise BuildError("no C++ compiler (c++, g++ or clang++) on the path")
    library = cache_folder() / f"{target.name}-{_key(compiler, target)}.so"
    if not library.exists():
        build(compiler, library, target)
    _refuse_others_files(library)
    return library


def build_in_place(target: Target = COPY) -> Path:
    """Put the library next to the source, for a package that is to be installed without a compiler."""
    library = _in_place(target)
    if not library.exists():
        unfinished = library.with_suffix(f".{os.getpid()}.tmp")
        shutil.copy(find_or_build(target), unfinished)
        os.replace(unfinished, library)
    return library


def _in_place(target: Target) -> Path:
    return target.source.with_name(f"{target.name}-{_key('', target)}.so")


def find_compiler() -> str | None:
    """The first C++ compiler on the path."""
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def cache_folder() -> Path:
    """Where built libraries live; made if missing, for this user alone."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    folder = (Path(home) if os.path.isabs(home) else Path.home() / ".cache") / "diptych" / "native"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def build(compiler: str, library: Path, target: Target = COPY) -> None:
    """Compile the source to `library` unless someone else just did. Raises BuildError with the compiler's words."""
    with _lock(library.with_suffix(".lock")):
        if library.exists():
            return
        unfinished = library.with_suffix(f".{os.getpid()}.tmp")
        try:
            _compile([compiler, *target.flags, str(target.source), "-o", str(unfinished)], target.attempts)
            unfinished.chmod(0o755)  # whatever the umask: see _refuse_others_files
            os.replace(unfinished, library)
        finally:
            unfinished.unlink(missing_ok=True)


def _compile(command: list[str], attempts: tuple[tuple[str, ...], ...]) -> None:
    """Run the compiler, and again with other flags where it fails (copies: for any CPU of the architecture)."""
    for extra in attempts:
        try:
            done = subprocess.run([*command, *extra], capture_output=True, text=True, timeout=BUILD_S, check=False)
        except subprocess.TimeoutExpired as error:
            raise BuildError(f"{command[0]} took more than {BUILD_S:.0f} s") from error
        if done.returncode == 0:
            return
    raise BuildError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")


def _key(compiler: str, target: Target = COPY) -> str:
    """Changes with the source, the flags, the machine and the compiler, without having to run the latter."""
    about = [platform.system(), platform.machine(), *target.flags, compiler]
    if compiler:
        stat = os.stat(compiler)
        about += [str(stat.st_size), str(stat.st_mtime_ns)]
    text = b"".join(path.read_bytes() for path in (target.source, *target.headers))
    return blake2b(text + "\0".join(about).encode(), digest_size=8).hexdigest()


def _refuse_others_files(library: Path) -> None:
    """Loading a library runs it, so it must be ours alone to change."""
    for path in (library, library.parent):
        stat = path.stat()
        if stat.st_uid not in (os.getuid(), 0) or stat.st_mode & 0o022:
            raise BuildError(f"{path} can be changed by other users; remove it")


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file. The kernel drops it with its holder, so a crash leaves nothing stale."""
    deadline = time.monotonic() + 1.5 * BUILD_S
    with open(path, "w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise BuildError(f"somebody has held {path} for {1.5 * BUILD_S:.0f} s") from error
                time.sleep(0.05)
        yield
