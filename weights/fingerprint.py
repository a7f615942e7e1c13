"""A fingerprint that tells checkpoints apart without reading all of them.

A safetensors file is an 8-byte little-endian length, a JSON header of that many bytes, and the
tensors' bytes (https://huggingface.co/docs/safetensors/index#format). The header is read, and the
first page of every tensor: some megabytes of 24 GB. A fine-tune that changes whole tensors changes
these pages. They are read one by one, because through a memory map the system would read ahead, and
so read most of the file.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from weights.serving.errors import InvalidFileError

PAGE = 4096  # bytes


@dataclass(frozen=True)
class Stored:
    """A tensor on disk.

    Attributes:
        dtype: as safetensors calls it, `BF16`.
        begin, end: in bytes from the start of the file.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def stored_tensors(directory: Path) -> dict[str, Stored]:
    """The tensors of all safetensors files in a directory, by name.

    Raises InvalidFileError if there are none, or one is damaged or cut off.
    """
    found: dict[str, Stored] = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= _read(path)
    if not found:
        raise InvalidFileError(f"{directory}: no safetensors files; expected a model's weights")
    return found


def fingerprint(tensors: Mapping[str, Stored]) -> str:
    """A hash (sha256, hex) of what a model is, however it is spread over files."""
    digest = hashlib.sha256()
    files: dict[Path, int] = {}
    try:
        for name, tensor in sorted(tensors.items()):
            if tensor.path not in files:
                files[tensor.path] = os.open(tensor.path, os.O_RDONLY)
                os.posix_fadvise(files[tensor.path], 0, 0, os.POSIX_FADV_RANDOM)
            start = os.pread(files[tensor.path], min(PAGE, tensor.end - tensor.begin), tensor.begin)
            digest.update(json.dumps([name, tensor.dtype, tensor.shape]).encode() + start)
    finally:
        for file in files.values():
            os.close(file)
    return digest.hexdigest()


def _read(path: Path) -> dict[str, Stored]:
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > size:
                raise ValueError("its header is cut off")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        found = {
            name: Stored(
                path,
                entry["dtype"],
                tuple(entry["shape"]),
                *(8 + length + offset for offset in entry["data_offsets"]),
            )
            for name, entry in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidFileError(f"{path}: no safetensors file, or damaged ({error})") from error
    needed = max((tensor.end for tensor in found.values()), default=8 + length)
    if needed != size:
        raise InvalidFileError(f"{path}: damaged or cut off: {size} bytes, expected {needed}")
    return found
