"""Output files: encoded in a thread beside the engine, kept until the server has read them."""

import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from PIL import Image

from weights.serving.directories import is_full, usable
from weights.serving.errors import DiskSpaceError
from weights.serving.scratch import Scratch
from weights.serving.timing import Stopwatch

SETTING = "FLUX_OUTPUT_DIRECTORY"
FORMATS = {"webp": "WEBP", "jpg": "JPEG", "png": "PNG"}
WEBP_METHOD = 1
"""Of 0 (fast) to 6 (small). Pillow's own 4 takes three times as long for 9 % (docs/encode.json)."""


class Outputs:
    """The output directory: one directory a request, removed when the next request begins.

    The server reads the files after the request has returned, so nothing may be deleted
    before the next one.
    """

    def __init__(self, parent: Path | None = None) -> None:
        self._scratch = Scratch(usable(parent, SETTING) if parent else None)
        self._encoder = ThreadPoolExecutor(max_workers=1, thread_name_prefix="encode")

    def begin(self, output_format: str, quality: int, stopwatch: Stopwatch) -> "RequestOutputs":
        """Remove the files of earlier requests and make room for those of a new one."""
        root = self._scratch.path
        with _disk_space(root.parent):
            self._scratch.make()
            for earlier in root.iterdir():
                shutil.rmtree(earlier, ignore_errors=True)
            directory = Path(tempfile.mkdtemp(dir=root))
        return RequestOutputs(directory, output_format, quality, stopwatch, self._encoder)


class RequestOutputs:
    """The files of one request; the context keeps all of them, or removes all after an error.

    Images are encoded in a thread of their own, one after another, while the engine generates the
    next. `wait` for them before leaving; an exception that leaves the context removes all.
    """

    def __init__(
        self,
        directory: Path,
        output_format: str,
        quality: int,
        stopwatch: Stopwatch,
        encoder: ThreadPoolExecutor,
    ) -> None:
        self.paths: list[Path] = []
        self._directory = directory
        self._format = output_format
        self._quality = quality
        self._stopwatch = stopwatch
        self._encoder = encoder
        self._pending: list[Future[None]] = []

    def add(self, image: Image.Image) -> None:
        """Queue an RGB image for encoding, under the next path of `paths`."""
        path = self._directory / f"output-{len(self.paths)}.{self._format}"
        self.paths.append(path)
        self._pending.append(self._encoder.submit(self._encode, image, path))

    def _encode(self, image: Image.Image, path: Path) -> None:
        with self._stopwatch.stage("encoding"), _disk_space(self._directory.parent.parent):
            save(image, path, self._format, self._quality)

    def wait(self) -> None:
        """Wait until everything is written.

        Raises:
            DiskSpaceError: the disk is full; and whatever else an encoding raised.
        """
        for job in self._pending:
            job.result()

    def __enter__(self) -> "RequestOutputs":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error:
            wait(self._pending)
            shutil.rmtree(self._directory)


@contextmanager
def _disk_space(directory: Path) -> Iterator[None]:
    """Translate the error of a full disk into one that says what to do."""
    try:
        yield
    except OSError as error:
        if not is_full(error):
            raise
        raise DiskSpaceError(
            f"The disk of the output directory {directory} is full: free some space, or set "
            f"{SETTING} to a directory on another disk"
        ) from error


def save(image: Image.Image, path: Path, output_format: str, quality: int) -> None:
    """Write an RGB image; quality 0 to 100 counts for webp and jpg, and not for png."""
    options = {} if output_format == "png" else {"quality": quality}
    if output_format == "webp":
        options["method"] = WEBP_METHOD
    image.save(path, format=FORMATS[output_format], **options)
