"""A checkpoint from the operator's own store: a URL of a tar, fetched and unpacked once.

The tar holds `dev` and `schnell`, and `safety` if the official checkers are wanted, at its root or
in one directory. `#sha256=HEX` at the end of the URL has it verified. While it is unpacked, the
disk holds it twice. Unlike an adapter's, this URL is the operator's: it may be on a private
network, and of any size.
"""

import gzip
import hashlib
import io
import logging
import lzma
import shutil
import tarfile
import zlib
from pathlib import Path, PurePosixPath
from urllib.parse import urldefrag

from filelock import FileLock

from weights.download.http import HttpClient, HttpSettings
from weights.download.remote import Remote
from weights.download.retry import RetryPolicy
from weights.download.transfer import Expected, LogProgress, download
from weights.serving.directories import is_full, usable
from weights.serving.errors import DiskSpaceError, InvalidFileError
from weights.serving.redact import without_secrets

logger = logging.getLogger(__name__)

MAX_BYTES = 1 << 40
CHUNK = 1 << 20


def unpacked(url: str, root: Path, retry: RetryPolicy | None = None) -> Path:
    """Return the directory with the unpacked tar of a URL; an existing one is used as it is.

    Args:
        root: where checkpoints are kept, each in a directory named by the hash of its URL.

    Raises:
        WeightsError: with a message for the operator.
    """
    root = usable(root, "FLUX_CACHE_DIRECTORY")
    name = without_secrets(url)
    target = root / hashlib.sha256(url.encode()).hexdigest()[:16]
    with FileLock(target.with_suffix(".lock")):
        if target.is_dir():
            return _inside(target)
        shutil.rmtree(target.with_suffix(".draft"), ignore_errors=True)  # of a start cut short
        try:
            archive = _fetched(url, name, target, retry or RetryPolicy())
            _unpack(archive, name, target)
        except OSError as error:
            shutil.rmtree(target.with_suffix(".draft"), ignore_errors=True)
            if not is_full(error):
                raise
            raise DiskSpaceError(
                f"{name}: the disk is full. Unpacking takes twice the size of the tar; free some, "
                f"or name a larger disk in FLUX_CACHE_DIRECTORY."
            ) from error
        return _inside(target)


def _fetched(url: str, name: str, target: Path, retry: RetryPolicy) -> Path:
    bare, fragment = urldefrag(url)
    _, _, sha256 = fragment.partition("sha256=")
    remote = Remote(bare, name)
    archive = target.with_suffix(".tar")
    client = HttpClient(HttpSettings(allow_private_hosts=True, max_bytes=MAX_BYTES))
    try:
        probe = client.probe(remote, retry)
        logger.info("Checkpoint %s: %.2f GB to fetch", name, (probe.size or 0) / 1e9)
        expected = Expected(probe.size, sha256.lower() or None, probe.validator)
        log = LogProgress(name)
        download(client, remote, archive, expected=expected, retry=retry, on_progress=log)
    finally:
        client.close()
    return archive


def _unpack(archive: Path, name: str, target: Path) -> None:
    """Unpack and remove the archive; only a whole directory takes the name `target`."""
    draft = target.with_suffix(".draft")
    draft.mkdir()
    try:
        with tarfile.open(archive) as members:
            for member in members:
                _extract(members, member, draft)
            _check_end(members)
    except (tarfile.TarError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, EOFError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        archive.unlink()
        raise InvalidFileError(
            f"{name}: this is not a tar, or it is damaged ({error}). FLUX_CHECKPOINT takes the URL "
            f"of a tar with the directories dev and schnell."
        ) from error
    archive.unlink()
    draft.replace(target)


def _check_end(archive: tarfile.TarFile) -> None:
    """Read on to the end after the last member, if it is compressed to the checksum.

    Raises:
        TarError: tarfile took a damaged header for the end, or the file is cut off there.
    """
    file = archive.fileobj
    if isinstance(file, io.BufferedReader):  # not compressed: going back costs nothing
        file.seek(archive.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.TarError(f"it breaks off after {len(archive.getmembers())} files")
    while file and file.read(CHUNK):
        pass


def _extract(archive: tarfile.TarFile, member: tarfile.TarInfo, directory: Path) -> None:
    """Write one member below a directory; a link becomes a copy of the file that it names.

    No link is ever made, so no member can lead out of the directory. (`extractall` with the filter
    "data" does not exist in Python 3.11.0 to 3.11.3.)

    Raises:
        TarError: the member's name leads out of the directory, or it is neither a directory nor a
            file, nor a link to a file in this archive.
    """
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts:
        raise tarfile.TarError(f"{member.name!r} leads out of the archive")
    target = directory / path
    try:
        if member.isdir():
            target.mkdir(parents=True, exist_ok=True)
            return
        content = archive.extractfile(member)
        if content is None:
            raise tarfile.TarError(f"{member.name!r} is neither a file nor a directory")
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as file:
            shutil.copyfileobj(content, file, CHUNK)
    except (KeyError, RecursionError) as error:
        raise tarfile.TarError(f"{member.name!r} links to no file of the archive") from error
    except ValueError as error:  # a NUL byte, which an extended header can carry
        raise tarfile.TarError(f"{member.name!r} is no name of a file") from error
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise tarfile.TarError(f"{member.name!r} is a file and a directory") from error


def _inside(directory: Path) -> Path:
    """The directory itself, or the only one in it if the tar was made of a directory."""
    entries = list(directory.iterdir())
    return entries[0] if len(entries) == 1 and entries[0].is_dir() else directory
