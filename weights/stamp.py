"""The note beside fetched files that all of them were verified, and which commit they are."""

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

from weights.manifest import Repository

logger = logging.getLogger(__name__)

NAME = ".verified"


@dataclass(frozen=True)
class Stamp:
    """What was verified.

    Attributes:
        commit: the full hash.
        revision: what was asked for, a commit too or the name of a branch or tag at that time.
        files: the manifest's patterns.
    """

    commit: str
    revision: str
    files: tuple[str, ...]

    def meets(self, revision: str) -> bool:
        """Whether the files are what a setting asks for, as far as can be told offline."""
        return revision in (self.commit, self.revision)


def read_stamp(path: Path, repository: Repository) -> Stamp | None:
    """The stamp of the files in a directory, if it covers what the manifest wants now."""
    try:
        content = json.loads(_file(path).read_text())
        stamp = Stamp(content["commit"], content["revision"], tuple(content["files"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return stamp if stamp.files == repository.files else None


def write_stamp(path: Path, repository: Repository, commit: str, revision: str) -> None:
    """Mark the files in a directory as verified, where that directory can be written to."""
    stamp = _file(path)
    try:
        stamp.parent.mkdir(exist_ok=True)
        stamp.write_text(json.dumps(asdict(Stamp(commit, revision, repository.files)), indent=1))
    except OSError as error:  # a volume that is mounted read-only
        logger.info("%s: cannot be marked as verified (%s)", repository.title, error.strerror)


def remove_stamp(path: Path) -> None:
    """Take the mark off, because the files are about to change."""
    _file(path).unlink(missing_ok=True)


def _file(path: Path) -> Path:
    """Beside the snapshots of huggingface_hub's cache, where it looks for nothing; else inside."""
    if path.parent.name == "snapshots":
        return path.parent.parent / "verified" / path.name
    return path / NAME
