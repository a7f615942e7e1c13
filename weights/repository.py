"""One repository of the hub: its wanted files planned, fetched by the hub's own client, verified.

huggingface_hub keeps what it fetches in its cache, shared with every other program, or copies it
to a directory; it goes on after a broken connection, and a later try skips the files that are
whole. Over plain HTTP it checks the size of a file, not its hash, so the hashes that the hub
announces are checked here, once per revision: a stamp says that it was done.
"""

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import (
    HfApi,
    constants,
    get_hf_file_metadata,
    hf_hub_url,
    snapshot_download,
)
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils.sha import git_hash

from weights.download.retry import RetryPolicy
from weights.download.transfer import sha256_of
from weights.hub import drop_leftovers, hub_call, progress_bar
from weights.manifest import Repository
from weights.serving.directories import is_full
from weights.serving.errors import DiskSpaceError, InvalidFileError, NotFoundError
from weights.serving.settings import Settings
from weights.stamp import read_stamp, remove_stamp, write_stamp

logger = logging.getLogger(__name__)

TIMEOUT = 10.0
NOTES = ".cache/huggingface/download"  # where huggingface_hub notes what it put into a directory


@dataclass(frozen=True)
class HubSettings:
    """Where the hub is, and how to ask it.

    Attributes:
        cache_dir: where huggingface_hub keeps files; None for its own default (HF_HOME).
    """

    endpoint: str = Settings.hf_endpoint
    token: str | None = field(default=None, repr=False)
    cache_dir: Path | None = None
    retry: RetryPolicy = field(  # the hub's limit of the rate lasts up to five minutes
        default_factory=lambda: RetryPolicy(attempts=3, longest_wait=310.0)
    )

    @classmethod
    def of(cls, settings: Settings) -> "HubSettings":
        """The part of the deployment's settings that is about the hub."""
        return cls(endpoint=settings.hf_endpoint, token=settings.hf_token)


@dataclass(frozen=True)
class PinnedRepository:
    """A repository at a revision: branch, tag, commit or refs/pr/NUMBER.

    Attributes:
        directory: where to put the files; None for the cache of huggingface_hub.
    """

    repository: Repository
    revision: str
    directory: Path | None = None

    @property
    def name(self) -> str:
        """The repository and revision, and the setting that chooses it, for messages."""
        return (
            f"{self.repository.name} at {self.revision} ({self.repository.short} in FLUX_REVISIONS)"
        )


class RepositoryDownload:
    """The tries of one repository, each going on where the one before stopped.

    Attributes:
        size: bytes that are to be fetched, after plan(). path: the files, after download().
    """

    path: Path

    def __init__(self, wanted: PinnedRepository, hub: HubSettings) -> None:
        self.wanted, self._hub, self.size = wanted, hub, 0
        self._files: list[RepoSibling] = []
        self._api = HfApi(endpoint=hub.endpoint, token=hub.token or False)

    @property
    def place(self) -> Path:
        """Where the files go."""
        return self.wanted.directory or _cache_root(self._hub)

    def plan(self) -> None:
        """Ask what the revision is and holds; raises SourceUnavailableError to be tried again."""
        repository = self.wanted.repository
        with hub_call(self.wanted.name, self._hub.token):
            self._revision = self._api.resolve_revision(
                repository.name, revision=self.wanted.revision, cache_dir=self._hub.cache_dir
            )
            listed = self._api.model_info(
                repository.name,
                revision=self._revision.resolved,
                files_metadata=True,
                timeout=TIMEOUT,
            )
        self._files = self._choose(listed.siblings or [])
        self._check_pins()
        base = self.wanted.directory or self._snapshot()
        missing = [file for file in self._files if not (base / file.rfilename).is_file()]
        self.size = sum(file.size or 0 for file in missing)
        if missing:
            directory = self.wanted.directory
            drop_leftovers(directory / ".cache" if directory else base.parents[1] / "blobs")
            self._knock(missing[0].rfilename)

    def _knock(self, file: str) -> None:
        """Ask for a file, without its content: everybody may list a gated repository."""
        endpoint = self._hub.endpoint
        url = hf_hub_url(
            self.wanted.repository.name, file, revision=self._revision.resolved, endpoint=endpoint
        )
        with hub_call(self.wanted.name, self._hub.token):
            get_hf_file_metadata(
                url, token=self._hub.token or False, timeout=TIMEOUT, endpoint=endpoint
            )

    def download(self, report: Callable[[int], None]) -> None:
        """Fetch and verify; raises SourceUnavailableError to be tried again.

        Args:
            report: called with the bytes that were fetched so far.
        """
        start, repository = time.monotonic(), self.wanted.repository
        commit = self._revision.resolved
        logger.info("%s (%s): licence: %s", repository.title, repository.name, repository.licence)
        title = f"{repository.title} at {commit[:12]}"
        logger.info("%s: %d files, %.2f GB to fetch", title, len(self._files), self.size / 1e9)
        if self.wanted.directory:
            self._drop_other_revision(self.wanted.directory)
        try:
            with hub_call(self.wanted.name, self._hub.token):
                self.path = self._download(report)
        except OSError as error:
            if not is_full(error):
                raise
            raise too_full(self.wanted.name, "more bytes", self.place) from error
        self._verify(self.path)
        write_stamp(self.path, repository, commit, self.wanted.revision)
        logger.info("%s: complete and verified in %.1f s", title, time.monotonic() - start)

    def _drop_other_revision(self, directory: Path) -> None:
        """Remove what huggingface_hub fetched there and this revision lacks, and another's mark.

        huggingface_hub only adds and replaces files. What it leaves would be read: transformers
        prefers one file to shards, and diffusers an index to one file.
        """
        stamp = read_stamp(directory, self.wanted.repository)
        if stamp and stamp.commit == self._revision.resolved:
            return
        chosen, notes = {file.rfilename for file in self._files}, directory / NOTES
        for note in sorted(notes.rglob("*.metadata")):
            name = note.relative_to(notes).as_posix().removesuffix(".metadata")
            if name not in chosen:
                (directory / name).unlink(missing_ok=True)
                note.unlink()
        remove_stamp(directory)

    def _download(self, report: Callable[[int], None]) -> Path:
        def count(done: int, _: int | None, unit: str) -> None:
            if unit == "B":
                report(done)

        found = snapshot_download(
            self.wanted.repository.name,
            revision=self._revision,
            cache_dir=self._hub.cache_dir,
            local_dir=self.wanted.directory,
            endpoint=self._hub.endpoint,
            token=self._hub.token or False,
            allow_patterns=list(self.wanted.repository.files),
            tqdm_class=progress_bar(count),  # type: ignore[arg-type]
        )
        return Path(found)

    def _choose(self, listed: Sequence[RepoSibling]) -> list[RepoSibling]:
        """The files that the manifest asks for; raises NotFoundError if a kind is missing."""
        chosen: dict[str, RepoSibling] = {}
        for pattern in self.wanted.repository.files:
            matches = {f.rfilename: f for f in listed if fnmatchcase(f.rfilename, pattern)}
            if not matches:
                raise NotFoundError(
                    f"{self.wanted.name}: this revision has no {pattern}. Name one that has with "
                    f"FLUX_REVISIONS={self.wanted.repository.short}=...: a branch, a tag, a commit "
                    f"or refs/pr/NUMBER."
                )
            chosen |= matches
        return list(chosen.values())

    def _check_pins(self) -> None:
        """Raise InvalidFileError if the manifest's revision no longer is what it was."""
        repository = self.wanted.repository
        if self.wanted.revision != repository.revision:
            return
        announced = {f.rfilename: f.lfs.sha256.lower() for f in self._files if f.lfs is not None}
        for name, expected in repository.sha256.items():
            if announced.get(name) != expected:
                raise InvalidFileError(
                    f"{self.wanted.name}: {name} has SHA-256 {announced.get(name)}, but the one "
                    f"that this package was made for has {expected}: the revision was changed. "
                    f"Look at what changed, and name a commit with "
                    f"FLUX_REVISIONS={repository.short}=..."
                )

    def _snapshot(self) -> Path:
        folder = "--".join(["models", *self.wanted.repository.name.split("/")])
        return _cache_root(self._hub) / folder / "snapshots" / self._revision.resolved

    def _verify(self, path: Path) -> None:
        """Compare every file with the hash that the hub announces; a wrong one is removed."""
        for file in self._files:
            found = path / file.rfilename
            if _is_intact(found, file):
                continue
            found.resolve().unlink()
            found.unlink(missing_ok=True)
            raise InvalidFileError(
                f"{self.wanted.name}: {file.rfilename} is not the file that the hub announces: "
                f"its hash differs. It was damaged on the way or on the disk, and is removed: "
                f"start again to fetch it anew. If this repeats, check the disk, and "
                f"HF_ENDPOINT's mirror."
            )


def _is_intact(path: Path, file: RepoSibling) -> bool:
    if file.lfs is not None:
        return sha256_of(path) == file.lfs.sha256.lower()
    return git_hash(path.read_bytes()) == file.blob_id


def cached(wanted: PinnedRepository, hub: HubSettings) -> Path | None:
    """What the cache of huggingface_hub has of the revision, if it has all that is wanted."""
    try:
        found = snapshot_download(
            wanted.repository.name,
            revision=wanted.revision,
            cache_dir=hub.cache_dir,
            allow_patterns=list(wanted.repository.files),
            local_files_only=True,
        )
    except LocalEntryNotFoundError:
        return None
    try:
        return Path(found) if _has_all(Path(found), wanted.repository.files) else None
    except (ValueError, KeyError, TypeError, AttributeError):  # a damaged index of shards
        return None


def _has_all(directory: Path, patterns: Sequence[str]) -> bool:
    """Whether all wanted files are there; without a list of them, huggingface_hub does not look."""
    found = [[path for path in directory.glob(p) if path.exists()] for p in patterns]
    shards = {
        index.parent / name
        for paths in found
        for index in paths
        if index.name.endswith(".safetensors.index.json")
        for name in json.loads(index.read_text())["weight_map"].values()
    }
    return all(found) and all(shard.exists() for shard in shards)


def _cache_root(hub: HubSettings) -> Path:
    return hub.cache_dir or Path(constants.HF_HUB_CACHE)


def too_full(name: str, what: str, place: Path) -> DiskSpaceError:
    """What to raise where a disk has no room for the files of some repositories."""
    return DiskSpaceError(
        f"{name}: the disk has no room for {what} in {place}. Free some, or name a "
        f"directory on a larger disk in HF_HOME."
    )
