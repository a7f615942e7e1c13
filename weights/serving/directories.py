"""Directories that settings name, and disks that are full."""

import errno
import tempfile
from pathlib import Path

from weights.serving.errors import DirectoryError


def usable(path: Path, setting: str) -> Path:
    """Make a directory if it is not there, and check that files can be written to it.

    Args:
        path: `~` is the home directory.
        setting: the environment variable that decides it, for the message.

    Returns:
        its absolute path.

    Raises:
        DirectoryError: it cannot be made or written.
    """
    try:
        directory = path.expanduser().absolute()
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return directory
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise DirectoryError(
            f"{path}: this directory cannot be written ({reason}); set {setting} to one that can"
        ) from error


def existing(path: Path) -> Path:
    """The nearest directory above a path that is there, or the path itself."""
    absolute = path.absolute()
    return next(place for place in (absolute, *absolute.parents) if place.exists())


def is_full(error: OSError) -> bool:
    """Whether an error says that the disk, or the user's share of it, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
