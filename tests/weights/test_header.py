"""Hostile files: refused before the safetensors library sees them, quickly, in bounded memory."""

import json
import struct
import time
import tracemalloc

import pytest

from weights.header import HeaderError, read_header


def write(path, entries, data=b"", length=None):
    raw = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(shape=(2,), begin=0, end=8, dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def test_a_sound_header_is_read(tmp_path):
    entries = {"__metadata__": {"a": "b"}, "x": entry(), "y": entry((), 8, 10, "BF16")}
    found = read_header(write(tmp_path / "f", entries, bytes(10)))
    assert found.metadata == {"a": "b"}
    assert found.tensors["x"].shape == (2,)
    assert found.tensors["y"].nbytes == 2


def test_tensors_may_be_empty(tmp_path):
    """Tools that prune ranks leave factors of rank 0."""
    entries = {"x": entry((0, 4), 0, 0), "y": entry(), "z": entry((2, 0), 8, 8)}
    found = read_header(write(tmp_path / "f", entries, bytes(8))).tensors
    assert [found[name].shape for name in "xyz"] == [(0, 4), (2,), (2, 0)]


@pytest.mark.parametrize("length", [0x280, 0x7B20, 0x3C20, 0x5B0A, 0x4B50, 0x8B1F])
def test_no_header_length_is_mistaken_for_another_file(tmp_path, length):
    """These lengths, as bytes, begin like a pickle, JSON, a page, a zip or a gzip archive."""
    raw = json.dumps({"x": entry()}).encode().ljust(length)
    assert list(read_header(write(tmp_path / "f", raw, bytes(8))).tensors) == ["x"]


@pytest.mark.parametrize(
    ("start", "name"),
    [
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "a web page"),
        (b"\n  <html lang='en'>404 not found</html>", "a web page"),
        (b"<?xml version='1.0'?><Error>AccessDenied</Error>", "a web page"),
        (b'{"error": "Repository not found"}', "Repository not found"),
        (b'[{"error": "gated"}]', "a JSON answer"),
        (b"PK\x03\x04\x00\x00\x08\x08\x00\x00\x00\x00" * 4, "PyTorch pickle"),
        (b"GGUF\x03\x00\x00\x00" + b"\x01" * 40, "GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "Git LFS pointer"),
        (b"", "empty"),
        (b"\0\0\0", "3 bytes"),
        (b"output/lora.safetensors".ljust(257, b"\0") + b"ustar\x0000", "tar archive"),
    ],
)
def test_other_files_are_named(tmp_path, start, name):
    path = tmp_path / "f"
    path.write_bytes(start)
    with pytest.raises(HeaderError, match=name):
        read_header(path)


METADATA_BOMB = b'{"__metadata__":{"a":"' + b"x" * (9 << 20) + b'"}}'
MALFORMED = {
    "no JSON": (b"nonsense ", b"", "not JSON"),
    "not UTF-8": (b'{"\xff": 1}', b"", "not JSON"),
    "no object": (b"[]", b"", "not a JSON object"),
    "nested too deep": (b"[" * 90_000, b"", "not JSON"),
    "brackets without end": (b"[" * 200_000, b"", "opening brackets"),
    "many small objects": (b'{"a":[' + b"{}," * 200_000 + b"{}]}", b"", "opening brackets"),
    "a long header": (METADATA_BOMB, b"", "at most .* with less metadata"),
    "a number of many digits": (b'{"a":' + b"9" * 100_000 + b"}", b"", "not JSON"),
    "a name twice": (b'{"x":{},"x":{}}', b"", "'x' twice"),
    "many names, one twice": (
        b"{" + b",".join(b'"%d":1' % i for i in range(400_000)) + b',"7":1}',
        b"",
        "'7' twice",
    ),
    "too many tensors": (
        {str(i): entry((1,), i, i + 1, "U8") for i in range(20_000)},
        bytes(20_000),
        "20000 tensors",
    ),
    "metadata not strings": ({"__metadata__": {"a": 1}, "x": entry()}, bytes(8), "metadata"),
    "entry not an object": ({"x": 5}, b"", "malformed"),
    "offsets missing": ({"x": {"dtype": "F32", "shape": [2]}}, bytes(8), "malformed"),
    "strange dtype": ({"x": entry(dtype="F32;DROP")}, bytes(8), "dtype"),
    "negative size": ({"x": entry((-2,))}, bytes(8), "shape"),
    "size not a number": ({"x": entry((True, 2))}, bytes(8), "shape"),
    "many dimensions": ({"x": entry((1,) * 50 + (2,))}, bytes(8), "shape"),
    "size and offsets differ": ({"x": entry((3,))}, bytes(8), "size"),
    "offsets before the data": ({"x": entry((2,), -8, 0)}, bytes(8), "size"),
    "overlap": ({"x": entry(), "y": entry((2,), 4, 12)}, bytes(12), "overlap"),
    "the same bytes twice": ({"x": entry(), "y": entry()}, bytes(8), "overlap"),
    "a gap": ({"x": entry(), "y": entry((2,), 12, 20)}, bytes(20), "gaps"),
    "cut off": ({"x": entry((1000,), 0, 4000)}, bytes(100), "cut off"),
    "trailing bytes": ({"x": entry()}, bytes(100), "damaged"),
}


@pytest.mark.parametrize(("raw", "data", "message"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_headers(tmp_path, raw, data, message):
    path = write(tmp_path / "f", raw, data)
    tracemalloc.start()
    start = time.monotonic()
    with pytest.raises(HeaderError, match=message) as caught:
        read_header(path)
    seconds = time.monotonic() - start
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(str(caught.value)) < 400
    assert seconds < 30  # what grows with the square of the names takes far longer
    assert peak < 150 << 20


@pytest.mark.parametrize(("length", "message"), [(10_000, "cut off"), (1 << 40, "is damaged")])
def test_a_length_beyond_the_file(tmp_path, length, message):
    with pytest.raises(HeaderError, match=message):
        read_header(write(tmp_path / "f", {"x": entry()}, bytes(8), length=length))


def test_long_names_do_not_fill_the_message(tmp_path):
    with pytest.raises(HeaderError) as caught:
        read_header(write(tmp_path / "f", {"x" * 10_000: 5}))
    assert len(str(caught.value)) < 200
