"""Output files: written beside the engine, kept until the next request, or not left at all."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.pictures import colours, same
from weights.serving.outputs import Outputs
from weights.serving.timing import Stopwatch

KILLED = """
import os, pathlib, sys
from weights.serving.outputs import Outputs
outputs = Outputs(pathlib.Path(sys.argv[1]))
os._exit(9)
"""


@pytest.fixture
def outputs(tmp_path: Path) -> Outputs:
    return Outputs(tmp_path)


def written(outputs: Outputs, kind: str, quality: int, *images: Image.Image) -> list[Path]:
    with outputs.begin(kind, quality, Stopwatch()) as files:
        for image in images:
            files.add(image)
        files.wait()
    return files.paths


def test_images_come_in_order_with_the_suffix_of_their_format(outputs) -> None:
    first, second = colours(48, 32), colours(48, 32, shift=99)
    paths = written(outputs, "png", 10, first, second)
    assert [path.name for path in paths] == ["output-0.png", "output-1.png"]
    assert same(Image.open(paths[0]), first)
    assert same(Image.open(paths[1]), second)


@pytest.mark.parametrize(("kind", "name"), [("webp", "WEBP"), ("jpg", "JPEG")])
def test_quality_is_size_and_nearness(outputs, kind: str, name: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    sizes, errors = [], []
    for quality in (0, 50, 100):
        (path,) = written(outputs, kind, quality, noise)
        with Image.open(path) as read:
            assert read.format == name
            errors.append(np.abs(np.asarray(read, int) - np.asarray(noise, int)).mean())
        sizes.append(path.stat().st_size)
    assert sizes == sorted(set(sizes))
    assert errors == sorted(set(errors), reverse=True)


def test_quality_does_not_count_for_png(outputs) -> None:
    contents = [written(outputs, "png", q, colours(48, 32))[0].read_bytes() for q in (0, 100)]
    assert contents[0] == contents[1]


def test_files_stay_until_the_next_request_begins(outputs, tmp_path) -> None:
    (earlier,) = written(outputs, "png", 80, colours(16, 16))
    assert earlier.is_file()
    (later,) = written(outputs, "jpg", 80, colours(16, 16))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [later]


def test_an_error_leaves_no_files(outputs, tmp_path) -> None:
    files = outputs.begin("png", 80, Stopwatch())
    files.add(colours(512, 512))
    with pytest.raises(KeyError), files:
        raise KeyError
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_seconds_of_encoding_are_counted(outputs) -> None:
    stopwatch = Stopwatch()
    with outputs.begin("webp", 80, stopwatch) as files:
        files.add(colours(256, 256))
        files.wait()
    assert stopwatch.seconds["encoding"] > 0


def test_the_directory_goes_with_its_owner(tmp_path) -> None:
    outputs = Outputs(tmp_path)
    written(outputs, "png", 80, colours(16, 16))
    del outputs
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_has_left_is_removed_by_the_next(tmp_path) -> None:
    living = Outputs(tmp_path)
    (kept,) = written(living, "png", 80, colours(16, 16))
    assert subprocess.run([sys.executable, "-c", KILLED, tmp_path], check=False).returncode == 9
    assert len(list(tmp_path.iterdir())) == 2
    for directory in tmp_path.iterdir():
        os.utime(directory, (0, 0))
    beside = Outputs(tmp_path)
    written(beside, "png", 80, colours(16, 16))
    assert kept.is_file()
    assert len(list(tmp_path.iterdir())) == 2


def test_a_directory_that_vanishes_is_made_anew_and_is_as_safe(tmp_path) -> None:
    directory = tmp_path / "mounted" / "outputs"
    outputs = Outputs(directory)
    shutil.rmtree(tmp_path / "mounted")
    (path,) = written(outputs, "png", 80, colours(16, 16))
    os.utime(path.parents[1], (0, 0))
    os.mkfifo(directory / "flux-files-of somebody else", 0o600)
    os.utime(directory / "flux-files-of somebody else", (0, 0))
    Outputs(directory)
    assert path.is_file()
