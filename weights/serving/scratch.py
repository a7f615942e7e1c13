"""Temporary directories of this process, and the removal of those that killed ones have left."""

import fcntl
import os
import shutil
import tempfile
import time
import weakref
from contextlib import suppress
from pathlib import Path

PREFIX = "flux-files-"
YOUNG_SECONDS = 3600.0  # may be in use by another machine, whose locks not all volumes show


class Scratch:
    """A directory that is removed with this object, at the latest when the process exits.

    A process that is killed removes nothing. So each holds a lock on its directory, and one that
    starts beside it removes those that nobody holds and nothing was written to for an hour.

    Args:
        parent: where to make it; None: in the system's temporary directory.
    """

    def __init__(self, parent: Path | None = None) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        self._hold()
        for other in self.path.parent.glob(f"{PREFIX}*"):
            if other != self.path:
                _remove_if_left(other)

    def make(self) -> None:
        """Make the directory anew if somebody, like a cleaner of temporary files, removed it."""
        if not self.path.is_dir():
            self._leave()  # the lock of what was there
            self.path.mkdir(parents=True, exist_ok=True)
            self._hold()

    def _hold(self) -> None:
        lock = _open(self.path)
        _take(lock)
        self._leave = weakref.finalize(self, _leave, self.path, lock)


def _open(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)


def _take(directory: int) -> bool:
    """Lock a directory, unless another process has; some network file systems cannot."""
    with suppress(OSError):
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def _remove_if_left(path: Path) -> None:
    with suppress(OSError):  # gone meanwhile, or another user's
        if time.time() - path.stat().st_mtime < YOUNG_SECONDS:
            return
        directory = _open(path)
        try:
            if _take(directory):
                shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(directory)


def _leave(path: Path, lock: int) -> None:
    shutil.rmtree(path, ignore_errors=True)
    os.close(lock)
