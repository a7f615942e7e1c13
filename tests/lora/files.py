"""Small .safetensors files, and a parser that knows just enough of them."""

import json
import struct
from dataclasses import dataclass
from pathlib import Path


def safetensors(content: str, size: int = 64) -> bytes:
    """A valid file with one tensor, whose key and bytes depend on `content`."""
    tensor = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
    header = json.dumps({content: tensor}).encode()
    data = (content.encode() * size)[:size]
    return struct.pack("<Q", len(header)) + header + data


@dataclass(frozen=True)
class Parsed:
    """What the tests know of an adapter: the key of its tensor says which file it was."""

    content: str
    digest: str
    nbytes: int
    format: str = "test"
    modules: int = 1
    ignored: tuple[str, ...] = ("bundle_emb.x",)
    trigger_words: tuple[str, ...] = ()


def parse(path: Path, digest: str, _settings: str) -> Parsed:
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return Parsed(next(iter(json.loads(data[8 : 8 + length]))), digest, len(data))


def add_files(hub, *names):
    """Put files of these contents on a stand-in; returns their URLs."""
    return [hub.add_file(f"/{name}.safetensors", safetensors(name)) for name in names]
