"""The private folder of a running cluster: its sockets, its key, signs of life. Held by whoever made it.

Who is killed leaves it behind; the next one that starts takes such folders away. Not responsible for what is in it.
"""

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from pathlib import Path

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
