"""What a cluster needs of this host: cores, files, and a private folder for sockets, its key and signs of life.

Who is killed leaves that folder behind; the next one that starts takes such folders away. Not responsible for what is
in it.
"""

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from pathlib import Path

from diptych.config import Cluster
from diptych.errors import ConfigError
from diptych.journal import refuse_used
from diptych.modelfacts import locate

PREFIX = "diptych-"
_LOCK = "held"


class Runtime:
    """A folder of mode 0700, locked until `close`, or until this process ends, however it does."""

    def __init__(self) -> None:
        sweep()
        self.path = tempfile.mkdtemp(prefix=PREFIX)
        # Under another name until it is locked: so nobody ever sees a lock that is free before its time.
        early = Path(self.path, f"{_LOCK}.new")
        self._file = os.open(early, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        fcntl.flock(self._file, fcntl.LOCK_EX)
        early.rename(Path(self.path, _LOCK))

    def close(self) -> None:
        """Remove it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._file)


def check_host(cluster: Cluster) -> None:
    """What would otherwise be found out by a process that has just been started; raises ConfigError."""
    have = os.sched_getaffinity(0)
    for worker in cluster.workers:
        if missing := set(worker.cores) - have:
            numbers, there = (",".join(map(str, sorted(cores))) for cores in (missing, have))
            raise ConfigError(f"{worker.name} is to have the cores {numbers}, and there are {there}")
    if Path(cluster.folder).is_absolute() or cluster.folder.startswith(("~", ".")):
        locate(cluster.folder)
    if cluster.journal:
        refuse_used(Path(cluster.journal))
        try:
            Path(cluster.journal).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"no journal can be kept in {cluster.journal}: {error.strerror}") from None


def sweep() -> None:
    """Remove the folders of this user whose owner is gone. What is not surely one of these is left alone."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            about = folder.lstat()
            if stat.S_ISDIR(about.st_mode) and about.st_uid == os.geteuid() and _is_free(folder / _LOCK):
                shutil.rmtree(folder, ignore_errors=True)


def _is_free(lock: Path) -> bool:
    file = os.open(lock, os.O_RDWR | os.O_NOFOLLOW)  # raises where there is none
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(file)
