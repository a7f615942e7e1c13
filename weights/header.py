"""The header of a safetensors file, read before anything else trusts the file.

A safetensors file is an 8-byte little-endian length, a JSON header of that many bytes, and
the tensors' bytes (https://huggingface.co/docs/safetensors/index#format). The safetensors
library checks offsets and dtypes, but it accepts duplicate keys, hundreds of thousands of
empty tensors and a hundred megabytes of metadata. Files come from strangers, so the
header is bounded and checked here first; only then does the library open the file.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

HEAD_BYTES = 512  # that other files are told by
MAX_HEADER_BYTES = 8 << 20  # at worst, JSON of so many takes 150 MB and a second to parse
MAX_BRACKETS = 100_000  # opening ones, strings included: bounds what parsing can allocate
MAX_TENSORS = 16_384
MAX_DIMENSIONS = 5

DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip

OTHER_FILES = (
    (b"PK\x03\x04", "a zip archive or a PyTorch pickle, which can run code and is never read"),
    (b"\x80\x02", "a Python pickle, which can run code and is never read"),
    (b"\x80\x04", "a Python pickle, which can run code and is never read"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"GGUF", "a GGUF file"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file it stands for"),
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
)


class HeaderError(ValueError):
    """A file that is not safetensors, or damaged; the message is fit to show to a user."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What the header says of one tensor.

    Attributes:
        dtype: as safetensors calls it, `BF16`.
        begin, end: in bytes from the start of the file.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Its size in the file, in bytes."""
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header: the tensors by name, and the `__metadata__` strings."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]


def read_header(path: Path) -> Header:
    """Read and check the header of `path`; the tensors themselves are not touched.

    Raises:
        HeaderError: the file is not safetensors, or its header is malformed or too large.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(HEAD_BYTES)
        refuse_other_files(start, size)
        length = int.from_bytes(start[:8], "little")
        if length > MAX_HEADER_BYTES:
            hint = "Save it again with less metadata, such as captions."
            if length > size - 8:
                hint = "It is damaged, or not a safetensors file."
            raise HeaderError(
                f"the file's header claims {length} bytes; at most {MAX_HEADER_BYTES} are "
                f"accepted. {hint}"
            )
        if length > size - 8:
            raise HeaderError(
                f"the file is cut off: its header needs {length} bytes and the file has {size}. "
                "Download it again."
            )
        file.seek(8)
        raw = file.read(length)
    entries = _parse(raw)
    metadata = _metadata(entries.pop("__metadata__", None))
    if len(entries) > MAX_TENSORS:
        raise HeaderError(f"the file holds {len(entries)} tensors; at most {MAX_TENSORS} allowed")
    return Header(_tensors(entries, 8 + length, size), metadata)


def short(text: str, limit: int = 100) -> str:
    """`text` quoted and cut to `limit` characters: names in hostile files end up in messages."""
    return repr(text if len(text) <= limit else text[: limit - 3] + "...")


def refuse_other_files(start: bytes, size: int) -> None:
    """Name the usual things that are downloaded in place of a safetensors file.

    Args:
        start: the first HEAD_BYTES, or all there are.
        size: of the file, in bytes.

    Raises:
        HeaderError: it is one of them.
    """
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    found = None
    if size < 10:
        found = "empty" if size == 0 else f"only {size} bytes long"
    elif start[257:262] == b"ustar":
        found = "a tar archive"
    elif any(start[4:8]):  # a length beyond 4 GB; with zeros there, text is a coincidence
        found = next((what for magic, what in OTHER_FILES if start.startswith(magic)), None)
        if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<error")):
            found = "a web page (an error or a login page), not the file behind it"
        elif text.startswith((b"{", b"[")):
            found = f"a JSON answer, probably an error{_said(start)}"
    if found:
        raise HeaderError(
            f"this is not a safetensors file: it is {found}. "
            "Check that the reference points at the .safetensors file itself."
        )


def _said(answer: bytes) -> str:
    """What a JSON error says; not the whole of it, which may hold secrets, as links do."""
    with suppress(ValueError):
        body = json.loads(answer)
        said = (body.get("message") or body.get("error")) if isinstance(body, dict) else None
        if isinstance(said, str) and "://" not in said:
            return f" ({short(said, 200)})"
    return ""


def _parse(raw: bytes) -> dict[str, Any]:
    """The header's JSON object; what parsing can allocate is bounded beforehand."""
    if (brackets := raw.count(b"{") + raw.count(b"[")) > MAX_BRACKETS:
        raise HeaderError(
            f"the file's header has {brackets} opening brackets; at most {MAX_BRACKETS} are "
            "accepted. It is damaged, or not a model."
        )
    try:
        parsed = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except HeaderError:
        raise
    except (ValueError, RecursionError) as error:
        raise HeaderError("this is not a safetensors file: its header is not JSON") from error
    if not isinstance(parsed, dict):
        raise HeaderError("this is not a safetensors file: its header is not a JSON object")
    return parsed


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise HeaderError(f"the file's header has {short(name)} twice")
            seen.add(name)
    return result


def _metadata(value: object) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise HeaderError("the file's __metadata__ must map strings to strings")
    return value


def _tensors(entries: dict[str, Any], start: int, size: int) -> dict[str, TensorInfo]:
    """Check every entry, and that the tensors fill the file from `start` on, without overlap."""
    tensors: dict[str, TensorInfo] = {}
    spans = []
    for name, entry in entries.items():
        dtype, shape, (begin, end) = _entry(name, entry)
        tensors[name] = TensorInfo(dtype, shape, start + begin, start + end)
        spans.append((begin, end))
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise HeaderError("the file is damaged: its tensors overlap or leave gaps")
        position = end
    if position != size - start:
        raise HeaderError(
            f"the file is damaged or cut off: its tensors need {position} bytes and it has "
            f"{size - start}. Download it again."
        )
    return tensors


def _entry(name: str, entry: object) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    """Dtype, shape and (begin, end) of one header entry, checked against each other."""
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]}:
            pass
        case _:
            raise HeaderError(f"the header's entry for {short(name)} is malformed")
    if dtype not in DTYPE_BYTES:
        raise HeaderError(f"{short(name)} has the dtype {short(dtype)}, which is not supported")
    if len(shape) > MAX_DIMENSIONS or not all(type(n) is int and 0 <= n < 1 << 32 for n in shape):
        raise HeaderError(f"{short(name)} has the shape {short(str(shape))}: not a weight's")
    if begin < 0 or end - begin != prod(shape) * DTYPE_BYTES[dtype]:
        raise HeaderError(f"{short(name)}: its size does not follow from its shape and dtype")
    return dtype, tuple(shape), (begin, end)
