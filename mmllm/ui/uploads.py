"""The folder of this run's uploads: only this user can open it, and it goes away with the process."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

if os.name == "posix":
    import fcntl

PREFIX = "mmllm-demo-"
ALIVE = ".alive"


class Uploads:
    """A fresh temporary folder, deleted by ``close`` or at exit; those of runs that were killed are deleted first.

    A run holds a lock on a file in its folder, which the system lets go however the run ends. So a folder whose lock is
    free is nobody's; process ids would not tell that across containers that share the temporary folder.
    """

    def __init__(self) -> None:
        _sweep()
        self._folder = tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True)
        self.path = Path(self._folder.name)
        self._lock: int | None = None
        if os.name == "posix":
            # Locked first and named then: a file with the name is never seen without its lock.
            new = self.path / f"{ALIVE}.new"
            self._lock = os.open(new, os.O_CREAT | os.O_RDWR, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            new.rename(self.path / ALIVE)

    def close(self) -> None:
        self._folder.cleanup()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _sweep() -> None:
    if os.name != "posix":
        return
    for alive in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/{ALIVE}"):
        try:
            lock = os.open(alive, os.O_RDWR)
        except OSError:
            continue  # another user's, or just gone
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(alive.parent, ignore_errors=True)
        except OSError:
            pass  # a run that lives
        finally:
            os.close(lock)
