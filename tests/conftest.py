"""Fixtures shared by the tests. What is large is imported in them: not all processes need it."""

import gc
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from PIL import Image

    from tests.support.official import Files
    from tests.support.predictor import Generate
    from tests.support.server import LoggedServer


def pytest_collection_finish() -> None:
    """What was imported stays: the collector need not look through it in every test."""
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of quick tests come last, so that processes that run in parallel end together."""
    items.sort(key=lambda item: "tests/lora/" in item.nodeid)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests for a card need one."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device on this machine")


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> "Iterator[LoggedServer]":
    """The real Cog server on the embedded checkpoint, one for all tests."""
    from tests.support.server import logged_server

    with logged_server(tmp_path_factory.mktemp("outputs")) as running:
        yield running


@pytest.fixture(scope="session")
def usual(tmp_path_factory) -> "Generate":
    """The `run` of a predictor under the default settings, one for all tests; gives images."""
    from tests.support.predictor import set_up_predictor

    with pytest.MonkeyPatch.context() as patch:
        return set_up_predictor(patch, tmp_path_factory.mktemp("outputs"))


@pytest.fixture(scope="session")
def photograph() -> "Image.Image":
    """A real photograph, 512 x 600: Grace Hopper, public domain, as matplotlib ships it."""
    import matplotlib
    from PIL import Image

    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    with Image.open(path) as photograph:
        return photograph.convert("RGB")


@pytest.fixture(scope="session")
def other_checkpoint(tmp_path_factory) -> Path:
    """A checkpoint of quite other dimensions than the committed one, with an 8x VAE."""
    from miniature import checkpoint

    directory = tmp_path_factory.mktemp("other_checkpoint")
    dimensions = checkpoint.Dimensions(
        double_blocks=1,
        single_blocks=3,
        heads=2,
        rope_axes=(4, 6, 6),
        t5_layers=1,
        t5_width=32,
        t5_heads=2,
        t5_head_width=8,
        t5_feed_forward=48,
        clip_layers=1,
        clip_width=24,
        clip_heads=2,
        clip_feed_forward=40,
        vae_channels=(8, 8, 16, 16),
        vae_layers=2,
    )
    checkpoint.build(directory, dimensions, seed=1)
    return directory


@pytest.fixture(scope="session")
def official_files(tmp_path_factory) -> "dict[str, Files]":
    """The files of the four official repositories, in miniature."""
    from tests.support import official

    return official.build(tmp_path_factory.mktemp("official"))


@pytest.fixture
def copied(tmp_path) -> Path:
    """The embedded checkpoint, copied to where a test may change it."""
    from flux.deployment import NANO

    return Path(shutil.copytree(NANO, tmp_path / "copied"))


@pytest.fixture
def hub():
    """A stand-in for the sites that adapters come from, on loopback."""
    from tests.support.hub import Hub

    with Hub() as running:
        yield running


@pytest.fixture
def start(monkeypatch, tmp_path) -> "Callable[..., Generate]":
    """Set up a predictor under the given environment; returns its `run`, giving images."""
    from tests.support.predictor import set_up_predictor

    return partial(set_up_predictor, monkeypatch, tmp_path / "outputs")
