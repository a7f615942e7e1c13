"""The step of script/bench gpu that tries other tiles for the merge kernel.

The ones that it has were chosen without a card.
"""

from functools import partial
from itertools import product

import torch
from torch import Tensor

from benchmarks.gpu import card
from benchmarks.gpu.session import Session
from flux.transformers.quantize import empty_float8, store

SHAPES = ((3072, 3072), (3072, 15360))  # the most frequent one, and that with the longest rows
RANKS = (8, 16, 32)
TILES = {
    "bf16": ((64, 128, 4), (64, 128, 8), (64, 64, 4), (128, 128, 8), (64, 256, 8)),
    "fp8": ((16, 128, 4), (16, 128, 8), (16, 256, 4), (16, 256, 8), (16, 512, 8), (32, 128, 4)),
}
"""Rows, columns and warps; the first is the one in use."""


def tiles(session: Session) -> None:
    """Microseconds of the kernel for one weight, by tile."""
    for name, shape, rank in product(TILES, SHAPES, RANKS):
        found: dict[tuple[int, ...], float | str] = {}
        tensors = _weight(session, name, shape, rank)
        for tile in TILES[name]:
            try:
                work = partial(_write, *tensors, tile)
                found[tile] = round(1e6 * card.seconds_of(work, session.device), 1)
            except Exception as error:  # Triton's are of many classes: one more result
                found[tile] = f"{type(error).__name__}: {error}"[:100]
        figures = {
            f"{name}, {shape[0]} x {shape[1]}, rank {rank}, {t}": v for t, v in found.items()
        }
        session.record("tiles", {f"{key}, us": value for key, value in figures.items()})


def _weight(
    session: Session, name: str, shape: tuple[int, int], rank: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A working weight, its base, the factors of a delta, and their scales."""
    rows, columns = (side // 48 if session.rehearse else side for side in shape)
    make = partial(torch.randn, device=session.device)
    base, up, down = (
        make(*sizes).bfloat16() for sizes in ((rows, columns), (rows, rank), (rank, columns))
    )
    working = torch.empty_like(base)
    if name == "fp8":
        working = empty_float8(base.shape, base.dtype, base.device, dynamic=True)
    return working, base, up, down, make(rank)


def _write(
    working: Tensor, base: Tensor, up: Tensor, down: Tensor, scales: Tensor, tile: tuple[int, ...]
) -> None:
    if working.device.type == "cuda":
        from flux.transformers.lora_kernel import Tile, write

        if not write(working, base, up, down, scales, tile=Tile(*tile)):
            raise NotImplementedError("not of a kind that the kernel writes")
    else:  # in a rehearsal
        store(working, base.float() + (up.float() * scales) @ down.float())
