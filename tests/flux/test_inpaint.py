"""Masks: what is repainted, and how the edge is softened."""

import numpy as np
import pytest
import torch
from PIL import Image

from flux.inpaint import FEATHER, repainted_cells, soft_alpha


def alpha_of(mask: np.ndarray) -> np.ndarray:
    return np.asarray(soft_alpha(Image.fromarray(mask.astype(np.uint8)))).astype(int)


def test_every_cell_that_the_mask_touches_is_repainted() -> None:
    mask = torch.zeros(1, 1, 32, 48)
    mask[..., 9, 17] = 0.01
    expected = torch.zeros_like(mask)
    expected[..., 8:16, 16:24] = 1
    assert torch.equal(repainted_cells(mask, 8), expected)


def test_the_edge_rises_inside_the_mask_and_reaches_all_of_it() -> None:
    mask = np.zeros((64, 64))
    mask[:, 20:] = 255
    row = alpha_of(mask)[30]
    assert (row[:20] == 0).all()
    shares = range(1, FEATHER + 2)
    assert row[20 : 20 + FEATHER + 1].tolist() == [round(255 * n / shares[-1]) for n in shares]
    assert (row[20 + FEATHER :] == 255).all()


@pytest.mark.parametrize("width", [1, 2, 3, 7, 15])
def test_narrow_strips_are_repainted_in_full_in_their_middle(width: int) -> None:
    mask = np.zeros((48, 48))
    mask[:, 20 : 20 + width] = 255
    alpha = alpha_of(mask)
    assert alpha[24].max() == 255
    assert (alpha[mask == 0] == 0).all()


def test_alpha_never_passes_the_mask_and_plain_masks_are_kept() -> None:
    mask = np.random.default_rng(0).integers(0, 256, (40, 56))
    assert (alpha_of(mask) <= mask).all()
    for value in (0, 1, 77, 128, 255):
        assert (alpha_of(np.full((16, 32), value)) == value).all()
