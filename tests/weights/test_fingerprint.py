"""Checkpoints told apart by their headers and a page of every tensor."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from weights.fingerprint import fingerprint, stored_tensors
from weights.serving.errors import InvalidFileError


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(100, 100, generator=generator).bfloat16() for name in "abcd"}


def of(directory: Path, *files: dict[str, torch.Tensor]) -> str:
    directory.mkdir()
    for number, content in enumerate(files):
        save_file(content, directory / f"{number}.safetensors", {"format": "pt"})
    return fingerprint(stored_tensors(directory))


def test_it_does_not_matter_how_they_are_spread_over_files(tmp_path) -> None:
    whole = tensors()
    halves = [{n: whole[n] for n in names} for names in ("db", "ac")]
    assert of(tmp_path / "one", whole) == of(tmp_path / "two", *halves)


@pytest.mark.parametrize("change", ["value", "name", "shape", "dtype", "fewer"])
def test_every_difference_shows(tmp_path, change: str) -> None:
    found = tensors()
    match change:
        case "value":
            found["c"][3, 7] = 9
        case "name":
            found["e"] = found.pop("c")
        case "shape":
            found["c"] = found["c"].view(50, 200)
        case "dtype":
            found["c"] = found["c"].view(torch.float16)
        case "fewer":
            del found["c"]
    assert of(tmp_path / "one", tensors()) != of(tmp_path / "other", found)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"<html>not found</html>", "it is a web page"),
        ((2).to_bytes(8, "little") + b"[]", "its header is not a JSON object"),
        ((10).to_bytes(8, "little") + b'{"a": 123}', "the header's entry for 'a' is malformed"),
        ((1 << 40).to_bytes(8, "little") + b"{}", "not a safetensors file"),
        ((2).to_bytes(8, "little") + b"{}more", "damaged or cut off"),
    ],
)
def test_what_is_no_safetensors_file_is_refused(tmp_path, content, message) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(InvalidFileError, match=message):
        stored_tensors(tmp_path)


def test_a_directory_without_weights_is_refused(tmp_path) -> None:
    with pytest.raises(InvalidFileError, match="no safetensors files; expected a model's weights"):
        stored_tensors(tmp_path)


def test_a_file_that_is_cut_off_is_refused(tmp_path) -> None:
    of(tmp_path / "model", tensors())
    path = tmp_path / "model" / "0.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InvalidFileError, match="damaged or cut off"):
        stored_tensors(tmp_path / "model")
