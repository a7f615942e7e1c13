"""The type of a downloaded file, and the one .safetensors file inside a trainer's archive.

The archive is not trusted, so it is never extracted. Its members are read as a stream, one regular
file is copied to a name that we choose, and the number and size of the members are limited. tarfile
reads a member's extended header into memory at once, whatever length it claims, so `_Member` checks
that length.
"""

import re
import struct
import tarfile
import zlib
from pathlib import Path, PurePosixPath
from typing import IO, Literal

from lora.peft_config import CONFIG_NAME, MAX_CONFIG_BYTES, config_of, settings_of
from weights.header import HEAD_BYTES, HeaderError, refuse_other_files
from weights.serving.cancel import CheckCancelled
from weights.serving.errors import InvalidFileError

Kind = Literal["safetensors", "tar"]

MAX_MEMBERS = 10_000
MAX_TEXT_BYTES = 1 << 16
MAX_CONFIGS = 64
MAX_EXTENDED_HEADER = 1 << 20
CHUNK = 1 << 20
EXTENDED = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)
TRIGGER = re.compile(r"""^[\s"'-]*trigger_word["']?\s*:\s*["']?([^"'\n,#]+)""", re.MULTILINE)
CONFIG_SUFFIXES = (".yaml", ".yml", ".json")


def kind_of(path: Path, name: str) -> Kind:
    """Tell a .safetensors file from a tar by its first bytes.

    Raises:
        InvalidFileError: it is something else, such as an error page, a pickle, a Git LFS pointer.
    """
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if head[257:262] == b"ustar" or head[:2] == b"\x1f\x8b":
        return "tar"
    size = path.stat().st_size
    if head[8:9] == b"{" and 0 < struct.unpack("<Q", head[:8])[0] < size:
        return "safetensors"
    try:
        refuse_other_files(head, size)
    except HeaderError as error:
        raise InvalidFileError(f"{name}: {error}") from error
    raise InvalidFileError(
        f"{name}: this is neither a .safetensors file nor a tar that holds one. Give the link of "
        "either."
    )


def take_weights(
    archive: Path, target: Path, name: str, max_bytes: int, check_cancelled: CheckCancelled
) -> tuple[tuple[str, ...], str]:
    """Copy the only .safetensors of a tar to `target`; returns what is found beside it.

    That is trigger words, and PEFT's settings (`settings_of`).

    Nothing is left after any exception.

    Args:
        max_bytes: bounds what the tar expands to.

    Raises:
        InvalidFileError: there is not exactly one such file, or if the tar or PEFT's configuration
            is damaged or beyond the bounds.
    """
    reader = _Reader(name, target, max_bytes, check_cancelled)
    try:
        _read(archive, name, reader)
        return reader.finish()
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def _read(archive: Path, name: str, reader: "_Reader") -> None:
    """Pass every member to the reader; errors name the tar."""
    try:
        with tarfile.open(archive, "r|*", tarinfo=_Member) as members:
            for member in members:
                reader.take(members, member)
    except InvalidFileError as error:
        raise InvalidFileError(f"{name}: {error}") from error
    except (tarfile.TarError, zlib.error, EOFError, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise InvalidFileError(
            f"{name}: the tar is damaged ({error}). Fetch or train it again."
        ) from error


class _Member(tarfile.TarInfo):
    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        """Check a header before its content is read.

        tarfile names this method as the one for subclasses to override. (`frombuf` would be public,
        but the patched Python 3.11.2 of Debian 12 does not call it.)
        """
        if self.type in EXTENDED and not 0 <= self.size <= MAX_EXTENDED_HEADER:
            raise InvalidFileError(
                f"the tar has an extended header of {self.size} bytes; at most "
                f"{MAX_EXTENDED_HEADER} are read. Pack it again."
            )
        member: tarfile.TarInfo = super()._proc_member(archive)  # type: ignore[misc]
        return member


class _Reader:
    """Collects from the members of one tar what an adapter needs."""

    def __init__(
        self, name: str, target: Path, max_bytes: int, check_cancelled: CheckCancelled
    ) -> None:
        self._name, self._target = name, target
        self._max_bytes, self._check_cancelled = max_bytes, check_cancelled
        self._members = self._bytes = 0
        self._found: list[str] = []
        self._triggers: list[str] = []
        self._configs: dict[str, bytes] = {}

    def take(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        """Read one member, and copy it if it holds the weights."""
        self._count(member)
        path = PurePosixPath(member.name)
        if member.type not in tarfile.REGULAR_TYPES or member.issparse() or path.name[:1] == ".":
            return
        content = archive.extractfile(member)
        if content is None:
            return
        suffix = path.suffix.lower()
        if suffix == ".safetensors":
            self._found.append(member.name)
            if len(self._found) == 1:
                self._copy(content)
        elif path.name == CONFIG_NAME:
            self._keep_config(str(path), content)
        elif member.size <= MAX_TEXT_BYTES and suffix in CONFIG_SUFFIXES:
            self._read_triggers(content.read().decode(errors="replace"))

    def finish(self) -> tuple[tuple[str, ...], str]:
        """Check that there was exactly one file of weights; the trigger words, PEFT's settings."""
        if len(self._found) != 1:
            held = ", ".join(self._found[:10]) or "none"
            raise InvalidFileError(
                f"{self._name}: a tar must hold exactly one .safetensors file, this one holds "
                f"{held}. Give the link of a single .safetensors file."
            )
        words = tuple(dict.fromkeys(self._triggers))
        config = self._configs.get(config_of(str(PurePosixPath(self._found[0]))) or "")
        return words, "" if config is None else settings_of(config, self._name)

    def _count(self, member: tarfile.TarInfo) -> None:
        self._check_cancelled()
        self._members += 1
        self._bytes += max(0, member.size)
        if self._members > MAX_MEMBERS or self._bytes > self._max_bytes:
            raise InvalidFileError(
                f"the tar holds more than {MAX_MEMBERS} files or {self._max_bytes / 1e9:.1f} GB"
            )

    def _copy(self, content: IO[bytes]) -> None:
        with self._target.open("wb") as file:
            while chunk := content.read(CHUNK):
                self._check_cancelled()
                file.write(chunk)

    def _keep_config(self, path: str, content: IO[bytes]) -> None:
        """Keep a configuration: the weights may come later."""
        if len(self._configs) == MAX_CONFIGS:
            raise InvalidFileError(f"the tar holds more than {MAX_CONFIGS} files {CONFIG_NAME}")
        self._configs[path] = content.read(MAX_CONFIG_BYTES + 1)

    def _read_triggers(self, text: str) -> None:
        words = (word.strip() for word in TRIGGER.findall(text))
        self._triggers += [word for word in words if word.lower() not in ("", "null", "none", "~")]
