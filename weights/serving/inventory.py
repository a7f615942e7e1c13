"""What setup has loaded: from where, how large, in how many seconds, and where it lives.

Filled by whoever loads, shown once, as a table at the end of setup. Sizes and places are read from
the tensors themselves, by protocol, so that this package needs no torch.
"""

import bisect
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, Protocol

from weights.serving.settings import GB

logger = logging.getLogger(__name__)

HOST = "host memory"
MAPPED = "memory map"
PAGE_LOCKED = "page-locked host memory"
MAPS = Path("/proc/self/maps")  # Linux: this process's memory, a line for each range
NUMBERS = 2  # columns from this one on, two of them, are numbers


class TensorLike(Protocol):
    """What is asked of a tensor."""

    @property
    def device(self) -> Any: ...  # noqa: ANN401, D102
    def numel(self) -> int: ...  # noqa: D102
    def element_size(self) -> int: ...  # noqa: D102
    def data_ptr(self) -> int: ...  # noqa: D102
    def is_pinned(self) -> bool: ...  # noqa: D102


@dataclass(frozen=True)
class Entry:
    """One row of the table.

    Attributes:
        name: of the component.
        place: where it lives; "-" where it is not loaded yet.
        source: the file, the directory or the component that it was made from, or will be.
        size: in bytes.
        seconds: that loading it took; None where it is not loaded yet.
    """

    name: str
    place: str
    source: str
    size: int
    seconds: float | None

    @classmethod
    def of(
        cls, name: str, tensors: Iterable[TensorLike], source: object, seconds: float
    ) -> "Entry":
        """The entry of a component that is these tensors."""
        held = list(tensors)
        return cls(name, place_of(held), str(source), size_of(held), seconds)

    @classmethod
    def later(cls, name: str, size: int, source: str) -> "Entry":
        """The entry of a component that is not loaded yet."""
        return cls(name, "-", source, size, None)

    @property
    def cost(self) -> str:
        """Size and seconds, as a line of the log shows them."""
        return f"{self.size / GB:.3f} GB in {self.seconds or 0:.1f} s"


class Inventory:
    """The entries of a setup, in the order of loading."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._entries: list[Entry] = []

    @contextmanager
    def loading(self, name: str, source: Path) -> Iterator[list[TensorLike]]:
        """Time the loading of a component; its tensors go into the list that is given.

        One without tensors, as a tokenizer, counts as large as the files of its source.
        """
        logger.info("Loading %s", name)
        start = time.perf_counter()
        tensors: list[TensorLike] = []
        yield tensors
        seconds = time.perf_counter() - start
        if tensors:
            self.add(Entry.of(name, tensors, source, seconds))
        else:
            files = (path for path in (source, *source.rglob("*")) if path.is_file())
            size = sum(path.stat().st_size for path in files)
            self.add(Entry(name, HOST, str(source), size, seconds))

    def add(self, *entries: Entry) -> None:
        """Add what was loaded elsewhere."""
        self._entries.extend(entries)

    def log(self) -> None:
        """Write the table into the log, a record for each line, and what each place holds."""
        for line in table(self._entries):
            logger.info("%s", line)
        places: dict[str, int] = {}
        for entry in self._entries:
            if entry.seconds is not None:
                places[entry.place] = places.get(entry.place, 0) + entry.size
        held = ", ".join(f"{size / GB:.3f} GB in {place}" for place, size in places.items())
        logger.info("Ready after %.1f s: %s", time.perf_counter() - self._start, held)


def table(entries: Sequence[Entry]) -> list[str]:
    """Lines of plain text, in columns; what is of any length, the source, comes last."""
    rows = [("component", "place", "GB", "seconds", "from")]
    for entry in entries:
        seconds = "-" if entry.seconds is None else f"{entry.seconds:.1f}"
        rows.append((entry.name, entry.place, f"{entry.size / GB:.3f}", seconds, entry.source))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if column >= NUMBERS else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=False))
        ]
        lines.append("  ".join([*cells, row[-1]]))
    return lines


def size_of(tensors: Iterable[TensorLike]) -> int:
    """Bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def place_of(tensors: Iterable[TensorLike]) -> str:
    """Where the most of these tensors' bytes are: a device, or which kind of host memory.

    A tensor on the host is in the memory map if its address is in a range that is backed by a file.
    """
    mapped = _mapped_files()
    sizes: dict[str, int] = {}
    for tensor in tensors:
        place = str(tensor.device)
        if place == "cpu":
            in_map = _is_within(tensor.data_ptr(), mapped)
            place = PAGE_LOCKED if tensor.is_pinned() else MAPPED if in_map else HOST
        sizes[place] = sizes.get(place, 0) + size_of([tensor])
    return max(sizes, key=sizes.__getitem__, default=HOST)


def _is_within(address: int, ranges: Sequence[tuple[int, int]]) -> bool:
    """Whether one of these ranges, which are in the order of their starts, has the address."""
    count = bisect.bisect_right(ranges, address, key=itemgetter(0))
    return count > 0 and address < ranges[count - 1][1]


def _mapped_files() -> list[tuple[int, int]]:
    """Address ranges of this process that are backed by files, in order, as Linux lists them."""
    if not MAPS.is_file():
        return []
    found = []
    for line in MAPS.read_text().splitlines():
        addresses, _, _, _, inode, *_ = line.split()
        if inode != "0":
            start, _, end = addresses.partition("-")
            found.append((int(start, 16), int(end, 16)))
    return found
