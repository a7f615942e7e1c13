"""Where each part of a checkpoint lies: dev, schnell, and the two safety checkers."""

from pathlib import Path

from weights.manifest import REPOSITORIES
from weights.settings import Settings
from weights.snapshot import STAMP, HubSettings, obtain
from weights.tarball import unpacked

EMBEDDED = Path(__file__).resolve().parent / "official"
"""What `script/download --directory weights/official` fills, to be built into an image."""


def directory_of(part: str, checkpoint: str, settings: Settings) -> Path:
    """Return the directory of a part, fetched if it is not there.

    part: a key of REPOSITORIES. checkpoint: `official`, `nano` (which has no checkers of its
    own), a directory, or the URL of a tar. Checkers that it does not hold come from the hub.
    Raises WeightsError with a message for the operator.
    """
    if checkpoint == "official":
        if (EMBEDDED / part / STAMP).is_file():
            return EMBEDDED / part
    elif checkpoint != "nano":
        found = root_of(checkpoint, settings) / part
        if found.is_dir() or not part.startswith("safety/"):
            return found
    return _from_hub(part, settings)


def commit_of(directory: Path) -> str | None:
    """The hub's commit that a directory is, in huggingface_hub's cache; else None."""
    return directory.name if directory.parent.name == "snapshots" else None


def root_of(checkpoint: str, settings: Settings) -> Path:
    """The directory that a path or the URL of a tar leads to."""
    if checkpoint.startswith(("http://", "https://")):
        return unpacked(checkpoint, settings.checkpoint_directory)
    return Path(checkpoint)


def _from_hub(part: str, settings: Settings) -> Path:
    repository = REPOSITORIES[part]
    revision: str = getattr(settings, repository.revision_setting)
    return obtain(repository, revision, HubSettings.of(settings))
