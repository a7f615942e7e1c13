"""Where each part of a checkpoint lies: dev, schnell, and the two safety checkers."""

import logging
from collections.abc import Iterable
from pathlib import Path

from weights.manifest import REPOSITORIES, Repository
from weights.repository import HubSettings, PinnedRepository, cached
from weights.serving.settings import Settings
from weights.snapshot import obtain
from weights.stamp import read_stamp
from weights.tarball import unpacked

logger = logging.getLogger(__name__)

EMBEDDED = Path(__file__).resolve().parent / "official"
"""What `script/download --directory weights/official` fills, to be built into an image."""


def fetch_missing(parts: Iterable[str], checkpoint: str, settings: Settings) -> None:
    """Download the parts that come from the hub and are missing.

    Args:
        parts, checkpoint: as for `directory_of`, which need not fetch anything afterwards.

    Raises:
        WeightsError: with a message for the operator; DiskSpaceError before the first byte, if
            the disk has no room for all of them.
    """
    missing = [part for part in parts if _local(part, checkpoint, settings) is None]
    for part in missing:
        if checkpoint == "official" and (EMBEDDED / part).is_dir():
            logger.warning(
                "%s is not used: it is incomplete, was not verified, or is of another version of "
                "this package. script/download --directory %s completes it.",
                *(EMBEDDED / part, EMBEDDED),
            )
    obtain([wanted(part, settings) for part in missing], HubSettings.of(settings))


def directory_of(part: str, checkpoint: str, settings: Settings) -> Path:
    """Return the directory of a part; missing files are downloaded.

    Args:
        part: a key of REPOSITORIES.
        checkpoint: `official`, `nano` (which has no checkers of its own), a directory, or the URL
            of a tar. Checkers that it does not hold come from the hub.

    Raises:
        WeightsError: with a message for the operator.
    """
    directory = _local(part, checkpoint, settings)
    if directory is None:
        (directory,) = obtain([wanted(part, settings)], HubSettings.of(settings))
    _log_use(directory, REPOSITORIES[part], settings)
    return directory


def is_there(part: str, checkpoint: str, settings: Settings) -> bool:
    """Whether `directory_of` would find a part without asking the hub; verified or not."""
    directory = _local(part, checkpoint, settings)
    if directory is not None:
        return directory.is_dir()
    return cached(wanted(part, settings), HubSettings.of(settings)) is not None


def commit_of(part: str, directory: Path) -> str | None:
    """The hub's commit that the files of a part are; None where they were not verified."""
    stamp = read_stamp(directory, REPOSITORIES[part])
    return stamp.commit if stamp else None


def root_of(checkpoint: str, settings: Settings) -> Path:
    """The directory that a path or the URL of a tar leads to."""
    if checkpoint.startswith(("http://", "https://")):
        return unpacked(checkpoint, settings.cache_directory / "checkpoints")
    return Path(checkpoint)


def wanted(part: str, settings: Settings, directory: Path | None = None) -> PinnedRepository:
    """A part at the revision that the settings ask for, to be put into a directory or cached."""
    repository = REPOSITORIES[part]
    return PinnedRepository(repository, _revision(repository, settings), directory)


def _revision(repository: Repository, settings: Settings) -> str:
    return dict(settings.revisions).get(repository.short, repository.revision)


def _local(part: str, checkpoint: str, settings: Settings) -> Path | None:
    """The directory of a part that does not come from the hub; None for one that does."""
    if checkpoint == "official":
        embedded = EMBEDDED / part
        return embedded if read_stamp(embedded, REPOSITORIES[part]) else None
    if checkpoint == "nano":
        return None
    directory = root_of(checkpoint, settings) / part
    return directory if directory.is_dir() or not part.startswith("safety/") else None


def _log_use(directory: Path, repository: Repository, settings: Settings) -> None:
    stamp = read_stamp(directory, repository)
    if stamp is None:
        logger.info("%s: not verified", repository.title)
        return
    logger.info(
        "%s (%s): licence: %s; commit %s",
        *(repository.title, repository.name, repository.licence, stamp.commit),
    )
    revision = _revision(repository, settings)
    if not stamp.meets(revision):
        logger.warning(
            "%s: these files were fetched at %s, and FLUX_REVISIONS asks for %s, which is not "
            "looked at: fetch it with script/download --directory, or remove %s.",
            *(repository.title, stamp.revision, revision, directory),
        )
