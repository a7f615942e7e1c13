"""The wanted files of one repository of the hub: fetched by its own client, verified, kept.

huggingface_hub keeps what it fetches in its cache, shared with every other program, or copies it
to a directory; it goes on after a broken connection, and a later try skips the files that are
whole. Over plain HTTP it checks the size of a file, not its hash, so the hashes that the hub
announces are checked here, once per revision: a stamp says that it was done.
"""

import errno
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils.sha import git_hash

from weights.download import LogProgress, sha256_of
from weights.errors import (
    AccessDeniedError,
    DiskSpaceError,
    InvalidFileError,
    NotFoundError,
    SourceUnavailableError,
)
from weights.hub import discreet, progress_bar, translated
from weights.manifest import Repository
from weights.retry import Patience
from weights.settings import Settings

logger = logging.getLogger(__name__)

STAMP = ".verified"
_TIMEOUT = 10.0
_ADVICE = (
    "Check the network, HF_ENDPOINT and HF_HUB_OFFLINE, or fetch the files ahead of time where "
    "there is a network: script/download."
)


@dataclass(frozen=True)
class HubSettings:
    """Where the hub is, and how to ask it.

    cache_dir: where huggingface_hub keeps files; None for its own default (HF_HOME).
    """

    endpoint: str = "https://huggingface.co"
    token: str | None = field(default=None, repr=False)
    cache_dir: Path | None = None
    patience: Patience = field(default_factory=lambda: Patience(attempts=3))

    @classmethod
    def of(cls, settings: Settings) -> "HubSettings":
        """The part of the deployment's settings that is about the hub."""
        return cls(endpoint=settings.hf_endpoint, token=settings.hf_token)


def obtain(repository: Repository, revision: str, hub: HubSettings) -> Path:
    """Return the directory of a repository's files; asks the hub only for what is not there.

    Raises WeightsError with a message for the operator.
    """
    there = _cached(repository, revision, hub)
    if there is not None and _is_stamped(there, repository):
        _log_licence(repository)
        logger.info("%s: found at %s", repository.title, there)
        return there
    try:
        return fetch(repository, revision, hub)
    except (SourceUnavailableError, AccessDeniedError, NotFoundError) as error:
        if there is None:
            raise
        logger.warning("%s Using the files from before, which were not verified.", error)
        return there


def fetch(
    repository: Repository, revision: str, hub: HubSettings, directory: Path | None = None
) -> Path:
    """Ask the hub what the revision is now, fetch what is missing, and verify all of it.

    directory: where to put the files; None for the cache of huggingface_hub.
    Raises WeightsError with a message for the operator.
    """
    _log_licence(repository)
    fetching = _Fetching(repository, revision, hub, directory)
    try:
        return hub.patience.persist(fetching.run)
    except SourceUnavailableError as error:
        raise SourceUnavailableError(f"{error} {_ADVICE}", error.retry_after) from error


class _Fetching:
    """The tries of one repository, each going on where the one before stopped."""

    def __init__(
        self, repository: Repository, revision: str, hub: HubSettings, directory: Path | None
    ) -> None:
        self._repository, self._revision = repository, revision
        self._hub, self._directory = hub, directory
        self._name = f"{repository.name} at {revision} ({repository.variable})"
        self._api = HfApi(endpoint=hub.endpoint, token=hub.token or False)

    def run(self) -> Path:
        """Make one try; raises SourceUnavailableError if another may help."""
        try:
            with translated(self._name, self._hub.token), discreet():
                return self._run()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise self._too_full("more bytes") from error

    def _run(self) -> Path:
        start, repository = time.monotonic(), self._repository
        revision = self._api.resolve_revision(
            repository.name, revision=self._revision, cache_dir=self._hub.cache_dir
        )
        listed = self._api.model_info(
            repository.name, revision=revision.resolved, files_metadata=True, timeout=_TIMEOUT
        )
        files = self._wanted(listed.siblings or [])
        size = self._check_room(files, revision.resolved)
        title = f"{repository.title} at {revision.resolved[:12]}"
        logger.info("%s: %d files, %.2f GB to fetch", title, len(files), size / 1e9)
        path = self._download(revision, title, size)
        self._verify(path, files)
        _write_stamp(path, repository)
        logger.info("%s: complete and verified in %.1f s", title, time.monotonic() - start)
        return path

    def _download(self, revision: str, title: str, size: int) -> Path:
        log = LogProgress(title)

        def report(done: int, _: int | None, unit: str) -> None:
            if unit == "B":
                log(done, size)

        found = snapshot_download(
            self._repository.name,
            revision=revision,
            cache_dir=self._hub.cache_dir,
            local_dir=self._directory,
            endpoint=self._hub.endpoint,
            token=self._hub.token or False,
            allow_patterns=list(self._repository.files),
            tqdm_class=progress_bar(report),  # type: ignore[arg-type]
        )
        return Path(found)

    def _wanted(self, listed: Sequence[RepoSibling]) -> list[RepoSibling]:
        """The files that the manifest asks for; raises NotFoundError if a kind is missing."""
        wanted: dict[str, RepoSibling] = {}
        for pattern in self._repository.files:
            matches = {f.rfilename: f for f in listed if fnmatchcase(f.rfilename, pattern)}
            if not matches:
                raise NotFoundError(
                    f"{self._name}: this revision has no {pattern}. Name one that has in "
                    f"{self._repository.variable}: a branch, a tag, a commit or refs/pr/NUMBER."
                )
            wanted |= matches
        return list(wanted.values())

    def _check_room(self, files: Sequence[RepoSibling], commit: str) -> int:
        """Bytes that are to be fetched; raises DiskSpaceError if the disk has no room for them."""
        base = self._directory or self._storage() / "snapshots" / commit
        size = sum(f.size or 0 for f in files if not (base / f.rfilename).is_file())
        existing = next(path for path in (base, *base.parents) if path.exists())
        if size > shutil.disk_usage(existing).free:
            raise self._too_full(f"{size / 1e9:.2f} GB")
        return size

    def _too_full(self, what: str) -> DiskSpaceError:
        place = self._directory or _cache_root(self._hub)
        return DiskSpaceError(
            f"{self._name}: the disk has no room for {what} in {place}. Free some, or name a "
            f"directory on a larger disk in HF_HOME."
        )

    def _storage(self) -> Path:
        folder = "--".join(["models", *self._repository.name.split("/")])
        return _cache_root(self._hub) / folder

    def _verify(self, path: Path, files: Sequence[RepoSibling]) -> None:
        """Compare every file with the hash that the hub announces; a wrong one is removed."""
        for file in files:
            found = path / file.rfilename
            if _is_intact(found, file):
                continue
            found.resolve().unlink()
            found.unlink(missing_ok=True)
            raise InvalidFileError(
                f"{self._name}: {file.rfilename} is not the file that the hub announces: its hash "
                f"differs. It was damaged on the way or on the disk, and is removed: start again "
                f"to fetch it anew. If this repeats, check the disk, and HF_ENDPOINT's mirror."
            )


def _is_intact(path: Path, file: RepoSibling) -> bool:
    if file.lfs is not None:
        return sha256_of(path) == file.lfs.sha256.lower()
    return git_hash(path.read_bytes()) == file.blob_id


def _cached(repository: Repository, revision: str, hub: HubSettings) -> Path | None:
    """What the cache of huggingface_hub has of the revision, if it has all that is wanted."""
    try:
        found = snapshot_download(
            repository.name,
            revision=revision,
            cache_dir=hub.cache_dir,
            allow_patterns=list(repository.files),
            local_files_only=True,
        )
    except LocalEntryNotFoundError:
        return None
    return Path(found)


def _cache_root(hub: HubSettings) -> Path:
    return hub.cache_dir or Path(constants.HF_HUB_CACHE)


def _stamp(path: Path) -> Path:
    """Beside the snapshots of huggingface_hub's cache, where it looks for nothing; else inside."""
    if path.parent.name == "snapshots":
        return path.parent.parent / "verified" / path.name
    return path / STAMP


def _is_stamped(path: Path, repository: Repository) -> bool:
    stamp = _stamp(path)
    return stamp.is_file() and stamp.read_text().split() == list(repository.files)


def _write_stamp(path: Path, repository: Repository) -> None:
    stamp = _stamp(path)
    try:
        stamp.parent.mkdir(exist_ok=True)
        stamp.write_text("\n".join(repository.files))
    except OSError as error:  # a volume that is mounted read-only
        logger.info("%s: cannot be marked as verified (%s)", repository.title, error.strerror)


def _log_licence(repository: Repository) -> None:
    logger.info("%s (%s): licence: %s", repository.title, repository.name, repository.licence)
