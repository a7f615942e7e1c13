"""Setup: the table of what was loaded, each component once, and checkpoints that are not whole."""

import mmap
import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flux.deployment import NANO
from tests.support.services import tar
from weights.manifest import REPOSITORIES
from weights.serving.inventory import HOST, MAPPED, place_of

COLUMNS = (r"(?P<name>\S+( \S+)*)", r"(?P<place>\S+( \S+)*)", r"(?P<gb>[\d.]+)", r"(?P<s>\S+)")
ROW = re.compile(" {2,}".join([*COLUMNS, "(?P<source>.+)"]))
LOADED = (
    "safety open_nsfw",
    "tokenizer",
    "tokenizer_2",
    "text_encoder",
    "text_encoder_2",
    "vae",
    "dev base weights",
    "schnell base weights",
    "dev bf16",
    "dev fp8",
    "schnell fp8",
    "schnell bf16",
)


def rows(lines: Sequence[str]) -> dict[str, re.Match[str]]:
    """The rows of the table of setup, by component."""
    lines = [line.rstrip("\n") for line in lines]
    start = next(i for i, line in enumerate(lines) if re.match("component +place +GB", line))
    found = [ROW.match(line) for line in lines[start + 1 :]]
    table = [row for row in found[: found.index(None)] if row]
    assert len({row["name"] for row in table}) == len(table)
    return {row["name"]: row for row in table}


def test_the_log_says_what_was_loaded_from_where_how_large_and_where_it_is(server) -> None:
    deadline = time.monotonic() + 30
    while not any(line.startswith("Ready after") for line in server.lines):
        assert time.monotonic() < deadline, "the table's last line never came"
        time.sleep(0.05)  # the log is read beside the server, which may answer before
    found = rows(server.lines)
    assert tuple(found) == LOADED
    assert {row["place"] for row in found.values()} == {"host memory"}
    in_bf16 = sum(f.stat().st_size for f in (NANO / "dev" / "transformer").glob("*.safetensors"))
    assert float(found["dev bf16"]["gb"]) == pytest.approx(2 * in_bf16 / 1e9, abs=0.001)
    assert float(found["dev fp8"]["gb"]) < 0.4 * float(found["dev bf16"]["gb"])
    assert float(found["vae"]["gb"]) == pytest.approx(0.003, abs=0.001)
    assert found["vae"]["source"] == str(NANO / "dev" / "vae")
    assert found["schnell base weights"]["source"] == str(NANO / "schnell" / "transformer")
    assert found["schnell fp8"]["source"] == "schnell base weights"
    (total,) = [line for line in server.lines if line.startswith("Ready after ")]
    gigabytes = sum(float(row["gb"]) for row in found.values())
    assert float(total.split(" s: ")[1].split()[0]) == pytest.approx(gigabytes, abs=0.006)


def test_each_component_is_loaded_once(server) -> None:
    lines = [line.strip() for line in server.lines if line.startswith("Loading ")]
    assert sorted(lines) == sorted(f"Loading {name}" for name in LOADED)


def test_official_checkers_are_in_the_table(start, official_files, tmp_path, caplog) -> None:
    for part in REPOSITORIES:
        for name, content in official_files[part].items():
            path = tmp_path / "checkpoint" / part / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    start(FLUX_CHECKPOINT=str(tmp_path / "checkpoint"))
    found = rows(caplog.messages)
    for name in ("compvis", "falconsai"):
        directory = tmp_path / "checkpoint" / "safety" / name
        stored = (directory / "model.safetensors").stat().st_size / 1e9
        assert found[f"safety {name}"]["source"] == str(directory)
        assert float(found[f"safety {name}"]["gb"]) == pytest.approx(stored, abs=0.001)


def test_where_the_dtype_is_that_of_the_files_they_are_mapped(start, caplog) -> None:
    start(FLUX_DTYPE="bfloat16")
    found = rows(caplog.messages)
    for name in ("text_encoder", "text_encoder_2", "dev base weights", "schnell base weights"):
        assert found[name]["place"] == "memory map"
    assert found["dev fp8"]["place"] == "host memory"


def test_what_is_not_brought_in_setup_is_in_the_table_too(start, caplog) -> None:
    start(FLUX_AT_START="fp8")
    found = rows(caplog.messages)
    assert tuple(found) == LOADED
    assert [name for name, row in found.items() if row["s"] == "-"] == ["dev bf16", "schnell bf16"]
    assert found["dev bf16"]["source"] == "with its first request"
    assert "layer by layer" not in caplog.text  # which FLUX_OFFLOAD asks for


def test_the_place_of_a_tensor(tmp_path) -> None:
    (tmp_path / "file").write_bytes(bytes(mmap.PAGESIZE))
    mapped = torch.from_file(str(tmp_path / "file"), shared=False, size=16)
    assert place_of([mapped]) == MAPPED
    assert place_of([mapped, torch.empty(1 << 20)]) == HOST  # the most of the bytes
    assert place_of([torch.empty(1, device="meta")]) == "meta"


# --- what fails setup

Damage = Callable[[Path], None]


def weights(directory: Path) -> Path:
    (path,) = directory.glob("*.safetensors")
    return path


def without_a_weight(directory: Path) -> None:
    path = weights(directory)
    tensors = load_file(path)
    tensors.pop(next(name for name in sorted(tensors) if name.endswith("weight")))
    save_file(tensors, path, {"format": "pt"})


def of_another_shape(directory: Path) -> None:
    path = weights(directory)
    tensors = load_file(path)
    name = next(name for name in sorted(tensors) if name.endswith("weight"))
    save_file(tensors | {name: tensors[name][:-1].clone()}, path, {"format": "pt"})


def cut_off(directory: Path) -> None:
    path = weights(directory)
    path.write_bytes(path.read_bytes()[:-100])


def in_a_pickle(directory: Path) -> None:
    torch.save(load_file(weights(directory)), directory / "pytorch_model.bin")
    without_the_file(directory)


def without_the_file(directory: Path) -> None:
    weights(directory).unlink()


def without(name: str) -> Damage:
    return lambda directory: (directory / name).unlink()


MODELS = ("dev/text_encoder", "dev/text_encoder_2", "dev/vae", "dev/transformer")
DAMAGES: list[tuple[str, Damage]] = [
    *((part, without_a_weight) for part in (*MODELS, "schnell/transformer")),
    *((part, of_another_shape) for part in (*MODELS, "schnell/transformer")),
    ("dev/text_encoder_2", cut_off),
    ("schnell/transformer", cut_off),
    ("dev/vae", without_the_file),
    ("dev/text_encoder", in_a_pickle),
    ("schnell/transformer", without_the_file),
    ("schnell/transformer", without("config.json")),
    ("dev/tokenizer", without("tokenizer.json")),
    ("dev/tokenizer_2", without("tokenizer.json")),
    ("dev/tokenizer_2", without("tokenizer_config.json")),
    ("dev/tokenizer", shutil.rmtree),
    ("dev/text_encoder", shutil.rmtree),
    ("schnell/scheduler", shutil.rmtree),
]


@pytest.mark.parametrize(("part", "damage"), DAMAGES)
def test_a_checkpoint_that_is_not_whole_fails_setup(start, copied, part, damage) -> None:
    damage(copied / part)
    name, directory = part.replace("/", " "), copied / part
    with pytest.raises(RuntimeError, match=f"{name}: cannot load {directory}: .*script/download"):
        start(FLUX_CHECKPOINT=str(copied))


def test_the_secret_of_a_checkpoints_url_is_not_shown(hub, start, tmp_path, caplog) -> None:
    url = hub.add_file("/flux.tar", tar({"dev/notes.txt": b"", "schnell/notes.txt": b""}))
    with pytest.raises(RuntimeError, match=rf"{url}: .*holds no pipeline") as caught:
        start(FLUX_CHECKPOINT=f"{url}?signature=geheim", FLUX_CACHE_DIRECTORY=str(tmp_path))
    assert f"checkpoint {url} on cpu" in caplog.text
    assert "geheim" not in f"{caught.value} {caplog.text}"
