"""Hostile files through the real server: seconds and peak memory until each is refused.

Adapters are files that the server may read (LORA_ALLOW_LOCAL_PATHS). Images and masks are data
URIs, as callers send them. The peak is that of the worker's resident memory, which is reset before
each request, above what it was then.
"""

import io
import json
import struct
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.shared.inputs import SMALL
from benchmarks.shared.report import parser, report
from miniature.evaluation.painter import data_uri
from serving.server import Server, processes
from weights.header import MAX_TENSORS

SECONDS, BYTES = 2, 300_000_000
INPUTS = {"prompt": "a hat", "num_inference_steps": 1, **SMALL}


def header(length: int, content: bytes = b"") -> bytes:
    return struct.pack("<Q", length) + content


def described(tensors: dict[str, Any], data: bytes = b"") -> bytes:
    content = json.dumps(tensors).encode()
    return header(len(content), content) + data


def tensor(start: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def tar(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for info, content in members:
            info.size = info.size or len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def link(kind: bytes, target: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo("flux-lora/lora.safetensors")
    info.type, info.linkname = kind, target
    return info


def cut_off() -> bytes:
    info = tarfile.TarInfo("flux-lora/lora.safetensors")
    info.size = 1 << 40
    return info.tobuf() + bytes(10_000)


SAFETENSORS: dict[str, Callable[[], bytes]] = {
    "a header of 2^63 bytes": lambda: header(1 << 63),
    "a header of 2 GB in a short file": lambda: header(2 << 30, b"{"),
    "a header of 90 MB": lambda: described({f"{i:090}": 0 for i in range(900_000)}),
    "brackets, nested a million deep": lambda: header(1_000_000, b"[" * 1_000_000),
    "half a million tensors": lambda: described(
        {f"t{i}": tensor(0, 0, [0]) for i in range(500_000)}
    ),
    "as many tensors as are allowed, of no adapter": lambda: described(
        {f"{i:0>400}": tensor(0, 0, [0]) for i in range(MAX_TENSORS)}
    ),
    "tensors that overlap": lambda: described(
        {"a": tensor(0, 8, [2]), "b": tensor(4, 12, [2])}, bytes(12)
    ),
    "a shape of 2^62": lambda: described({"a": tensor(0, 8, [1 << 31, 1 << 31])}, bytes(8)),
    "100 MB of zeros": lambda: bytes(100_000_000),
}
TARS: dict[str, Callable[[], bytes]] = {
    "a member of a terabyte": cut_off,
    "a link to /etc/passwd": lambda: tar((link(tarfile.SYMTYPE, "/etc/passwd"), b"")),
    "a device": lambda: tar((link(tarfile.CHRTYPE, ""), b"")),
    "fifty thousand members": lambda: tar(
        *((tarfile.TarInfo(f"flux-lora/{i}"), b"") for i in range(50_000))
    ),
}


def chunk(kind: bytes, content: bytes) -> bytes:
    body = kind + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    start = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", start) + b"".join(chunks) + chunk(b"IEND", b"")


def many_frames() -> bytes:
    """Of 65 megapixels each."""
    frame, buffer = Image.new("L", (9000, 8000)), io.BytesIO()
    frame.save(buffer, "GIF", save_all=True, append_images=[frame] * 3)
    return buffer.getvalue()


def photograph(side: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side)).save(buffer, "JPEG")
    return buffer.getvalue()


PICTURES: dict[str, Callable[[], bytes]] = {
    "a PNG of 60000 x 60000": lambda: png(
        60_000, 60_000, chunk(b"IDAT", zlib.compress(bytes(60_001 * 1000)))
    ),
    "a PNG with a profile of 500 MB": lambda: png(
        64, 64, chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(500_000_000)))
    ),
    "a PNG with a text of 500 MB": lambda: png(
        64, 64, chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(500_000_000)))
    ),
    "a GIF of 72 megapixels and four frames": many_frames,
    "a JPEG of 81 megapixels": lambda: photograph(9000),
    "a JPEG that is cut off": lambda: photograph(3000)[:5000],
    "10 MB that are no image": lambda: bytes(10_000_000),
}


def cases(directory: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """What each file is, and the inputs that name it."""
    for kind, suffix, makers in (("safetensors", "", SAFETENSORS), ("tar", ".tar", TARS)):
        for number, (name, make) in enumerate(makers.items()):
            path = directory / f"{kind}-{number}{suffix or '.safetensors'}"
            path.write_bytes(make())
            yield f"{kind}: {name}", {"replicate_weights": str(path)}
    plain = data_uri(photograph(256))
    for name, make in PICTURES.items():
        given = data_uri(make())
        yield f"image: {name}", {"image": given}
        yield f"mask: {name}", {"image": plain, "mask": given}


def peak(pid: int) -> int:
    """The most bytes that were resident since the last reset."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def main() -> int:
    arguments = parser().parse_args()
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="hostile-") as directory:
        outputs = f"{directory}/outputs"
        settings = {
            "FLUX_CHECKPOINT": "nano",
            "FLUX_DEVICE": "cpu",
            "FLUX_OUTPUT_DIRECTORY": outputs,
            "FLUX_CACHE_DIRECTORY": f"{directory}/cache",
            "LORA_ALLOW_LOCAL_PATHS": "true",
        }
        with Server(settings) as server:
            before = server.predict({**INPUTS, "seed": 1})["output"]
            (worker,) = processes(b"_run_worker", f"FLUX_OUTPUT_DIRECTORY={outputs}")
            for name, inputs in cases(Path(directory)):
                Path(f"/proc/{worker}/clear_refs").write_text("5")
                start, held = time.monotonic(), peak(worker)
                answer = server.predict({**INPUTS, **inputs})
                rows[name] = {
                    "seconds": round(time.monotonic() - start, 2),
                    "peak, MB": round((peak(worker) - held) / 1e6),
                    "status": answer["status"],
                    "error": (answer.get("error") or "")[:200],
                }
            same = server.predict({**INPUTS, "seed": 1})["output"] == before
    bad = [
        name
        for name, row in rows.items()
        if row["status"] != "failed" or row["seconds"] > SECONDS or row["peak, MB"] > BYTES / 1e6
    ]
    document = {"files": rows, "over 2 s or 300 MB, or not refused": bad, "image is the same": same}
    report("hostile", document, arguments.json)
    return 0 if same and not bad else 1


if __name__ == "__main__":
    raise SystemExit(main())
