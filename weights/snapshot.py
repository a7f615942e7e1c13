"""The official repositories of a start: looked at together, then fetched one after another.

Before the first byte is fetched, the disk must have room for all, and the progress has a total.
"""

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from weights.download.transfer import LogProgress
from weights.repository import HubSettings, PinnedRepository, RepositoryDownload, cached, too_full
from weights.serving.directories import existing
from weights.serving.errors import (
    AccessDeniedError,
    NotFoundError,
    SourceUnavailableError,
    WeightsError,
    sentences,
)
from weights.stamp import read_stamp

logger = logging.getLogger(__name__)

ADVICE = (
    "Check the network, HF_ENDPOINT and HF_HUB_OFFLINE, or fetch the files ahead of time where "
    "there is a network: script/download."
)


def obtain(wanted: Sequence[PinnedRepository], hub: HubSettings) -> list[Path]:
    """Return the directory of each repository's files; asks the hub only for what is not there.

    Raises:
        WeightsError: with a message for the operator.
    """
    there = {one.name: path for one in wanted if (path := cached(one, hub)) is not None}
    whole = {
        one.name: there[one.name]
        for one in wanted
        if one.name in there and read_stamp(there[one.name], one.repository) is not None
    }
    fetched = _run([one for one in wanted if one.name not in whole], hub, there)
    paths = there | fetched
    return [paths[one.name] for one in wanted]


def fetch_snapshots(wanted: Sequence[PinnedRepository], hub: HubSettings) -> None:
    """Ask the hub what the revisions are now, fetch what is missing, and verify all of it.

    Raises:
        WeightsError: with a message for the operator.
    """
    _run(wanted, hub, {})


def _run(
    wanted: Sequence[PinnedRepository], hub: HubSettings, unverified: Mapping[str, Path]
) -> dict[str, Path]:
    """Plan all, check that the disk has room for all, fetch one after another.

    Args:
        unverified: by name, files that will do if the hub cannot be asked about them.

    Returns:
        the directory of each that was fetched, by name.
    """

    def succeeds(one: RepositoryDownload, action: Callable[[], None]) -> bool:
        try:
            hub.retry.run(action)
        except WeightsError as error:
            if one.wanted.name not in unverified or not isinstance(
                error, SourceUnavailableError | AccessDeniedError | NotFoundError
            ):
                raise _with_advice(error, one.wanted) from error
            logger.warning("Using the files from before, which were not verified: %s", error)
            return False
        return True

    planned = [
        one for one in (RepositoryDownload(w, hub) for w in wanted) if succeeds(one, one.plan)
    ]
    _check_room(planned)
    progress = _Progress(sum(one.size for one in planned))
    paths: dict[str, Path] = {}
    for one in planned:
        if succeeds(one, partial(one.download, progress)):
            paths[one.wanted.name] = one.path
        progress.complete(one.size)
    return paths


def _with_advice(error: WeightsError, wanted: PinnedRepository) -> WeightsError:
    general = ADVICE if isinstance(error, SourceUnavailableError) else ""
    return type(error)(sentences(str(error), general, wanted.repository.remedy))


def _check_room(planned: Sequence[RepositoryDownload]) -> None:
    """Raise DiskSpaceError if the disk has no room for what all are to fetch."""
    lacking = [one for one in planned if one.size]
    if not lacking:
        return
    size, place = sum(one.size for one in lacking), lacking[0].place
    logger.info("%.2f GB to fetch in all, into %s", size / 1e9, place)
    free = shutil.disk_usage(existing(place)).free
    if size > free:
        names = ", ".join(one.wanted.name for one in lacking)
        raise too_full(names, f"{size / 1e9:.2f} GB ({free / 1e9:.2f} are free)", place)


class _Progress:
    """Bytes of all repositories, as the log tells them."""

    def __init__(self, total: int) -> None:
        self.total, self._before, self._furthest = total, 0, 0
        self._log = LogProgress("official files")

    def __call__(self, done: int) -> None:
        """Report bytes of the repository in hand; the client counts them at two points."""
        self._furthest = max(self._furthest, self._before + done)
        self._log(self._furthest, self.total)

    def complete(self, size: int) -> None:
        """Go on to the next repository, after one of so many bytes."""
        self._before += size
