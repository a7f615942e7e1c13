"""The base transformers, one for each variant, on the host.

They are never written: `flux/transformers/pool.py` makes working weights from them. A variant with
float8 weights on disk needs its base copy only for adapters and for bf16. That copy is opened
when its first weight is read; the others are opened in setup.

Opening maps the files into memory. With CUDA, weights that are read repeatedly from the host are
then copied into page-locked memory, if there is room. A thread copies them beside the rest of setup
if setup knows that they will be read; otherwise the first read does. Weights that have a copy on
the device are not page-locked.
"""

import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from flux.memory.budget import bytes_of
from flux.transformers.prequantized import Prequantized
from weights.serving.inventory import Entry

logger = logging.getLogger(__name__)


class BaseWeights:
    """One variant's base transformer.

    Args:
        variant: its name.
        skeleton: a transformer of its configuration and dtype, without memory.
        load: opens the base transformer.
        source: where that comes from, as the log shows it.
        prequantized: its float8 weights from disk, if there are any.
        pin: copies a module's weights into memory that is faster to read, and says whether it did.
    """

    def __init__(
        self,
        variant: str,
        skeleton: nn.Module,
        load: Callable[[], nn.Module],
        source: Path,
        prequantized: Prequantized | None = None,
        pin: Callable[[nn.Module], bool] | None = None,
    ) -> None:
        self.skeleton = skeleton
        self.prequantized = prequantized
        self._name = f"{variant} base weights"
        self._load = load
        self._source = source
        self._pin = pin
        self._pinning: Future[float] | None = None  # the seconds that it takes
        self._module: nn.Module | None = None
        self._values: Mapping[str, Tensor] = {}
        self._seconds = 0.0

    @property
    def is_open(self) -> bool:
        """Whether the files have been opened."""
        return self._module is not None

    def open(self) -> Mapping[str, Tensor]:
        """Return the base values by parameter name; the first call opens the files.

        Raises:
            CheckpointError: they cannot be opened.
        """
        if self._module is None:
            logger.info("Loading %s", self._name)
            start = time.perf_counter()
            self._module = self._load()
            self._values = dict(self._module.named_parameters())
            self._seconds = time.perf_counter() - start
            self._say()
        return self._values

    def begin(self) -> None:
        """Start a thread that copies the values into memory that is faster to read.

        Until `at_hand` or `entry` has returned, nobody else may read them.
        """
        self.open()
        if self._module and self._pin and not self._pinning:
            thread = ThreadPoolExecutor(1, thread_name_prefix="pin")
            self._pinning = thread.submit(_timed, partial(self._pin, self._module))
            thread.shutdown(wait=False)  # it ends with its work

    def at_hand(self) -> Mapping[str, Tensor]:
        """Return the base values, in memory that is faster to read where there is some.

        Raises:
            CheckpointError: the files cannot be opened.
        """
        if self._pin or not self.is_open:
            self.begin()
            self._join()
        return self._values

    def entry(self) -> Entry:
        """A row for the table of setup; it waits for what `begin` has begun."""
        if self._module is None:
            later = f"{self._source}, with the first adapter or bf16 request"
            return Entry.later(self._name, bytes_of(self.skeleton), later)
        self._join()
        return Entry.of(self._name, self._values.values(), self._source, self._seconds)

    def _join(self) -> None:
        """Wait for the thread, and raise what it raised; a later call starts over."""
        if pinning := self._pinning:
            self._pinning = None
            self._seconds += pinning.result()
            self._pin = None  # done, or without room for it
            self._say()

    def _say(self) -> None:
        held = Entry.of(self._name, self._values.values(), self._source, self._seconds)
        logger.info("%s is in %s: %s", held.name, held.place, held.cost)


def _timed(work: Callable[[], object]) -> float:
    """Do some work; return its seconds."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
