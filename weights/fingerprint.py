"""A fingerprint that tells checkpoints apart without reading all of them.

The headers of its safetensors files are read, and the first
page of every tensor: some megabytes of 24 GB. A fine-tune that changes whole tensors changes
these pages. They are read one by one, because through a memory map the system would read ahead, and
so read most of the file.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from weights.header import HeaderError, TensorInfo, read_header
from weights.serving.errors import InvalidFileError

PAGE = 4096  # bytes


class StoredTensor(NamedTuple):
    """A tensor on disk."""

    path: Path
    tensor: TensorInfo


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """The tensors of all safetensors files in a directory, by name.

    Raises:
        InvalidFileError: there are none, or one is damaged or cut off.
    """
    found: dict[str, StoredTensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= _read(path)
    if not found:
        raise InvalidFileError(f"{directory}: no safetensors files; expected a model's weights")
    return found


def fingerprint(tensors: Mapping[str, StoredTensor]) -> str:
    """A hash (sha256, hex) of what a model is, however it is spread over files."""
    digest = hashlib.sha256()
    files: dict[Path, int] = {}
    try:
        for name, (path, tensor) in sorted(tensors.items()):
            if path not in files:
                files[path] = os.open(path, os.O_RDONLY)
                os.posix_fadvise(files[path], 0, 0, os.POSIX_FADV_RANDOM)
            start = os.pread(files[path], min(PAGE, tensor.nbytes), tensor.begin)
            digest.update(json.dumps([name, tensor.dtype, tensor.shape]).encode() + start)
    finally:
        for file in files.values():
            os.close(file)
    return digest.hexdigest()


def _read(path: Path) -> dict[str, StoredTensor]:
    try:
        tensors = read_header(path).tensors
    except HeaderError as error:
        raise InvalidFileError(f"{path}: {error}".removesuffix(".")) from error
    return {name: StoredTensor(path, tensor) for name, tensor in tensors.items()}
