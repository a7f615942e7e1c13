"""Input files: fetched by Cog before a request comes here, gone at the latest with the next one."""

import tempfile
import weakref
from collections.abc import Collection
from pathlib import Path

from weights.serving.scratch import Scratch


class InputFiles(Scratch):
    """The directory to which Cog fetches the files of a request's inputs.

    Cog removes those of a request that it has served, but not what a download that failed or was
    cancelled has left (cog 0.23, `URLPath.convert`). It takes the default directory of `tempfile`,
    which is set to this one, for as long as this object lives.
    """

    def __init__(self) -> None:
        tempfile.tempdir = None  # the system's
        super().__init__()
        tempfile.tempdir = str(self.path)
        weakref.finalize(self, _forget, tempfile.tempdir)

    def clear(self, keep: Collection[Path]) -> None:
        """Remove all files but these; directories are not Cog's."""
        self.make()
        for file in self.path.iterdir():
            if file.is_file() and file not in keep:
                file.unlink(missing_ok=True)


def _forget(directory: str) -> None:
    if tempfile.tempdir == directory:
        tempfile.tempdir = None
