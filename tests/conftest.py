"""Fixtures shared by the tests."""

from pathlib import Path

import miniature
import pytest

from tests.hub import Hub


@pytest.fixture(scope="session")
def other_checkpoint(tmp_path_factory) -> Path:
    """A checkpoint of quite other dimensions than the committed one, with an 8x VAE."""
    directory = tmp_path_factory.mktemp("other_checkpoint")
    dimensions = miniature.Dimensions(
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
    miniature.build(directory, dimensions, seed=1)
    return directory


@pytest.fixture
def hub():
    """A stand-in for the sites that adapters come from, on loopback."""
    with Hub() as running:
        yield running
