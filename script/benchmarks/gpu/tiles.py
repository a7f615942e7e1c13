"""The step of script/bench gpu that tries other tiles for the merge kernel.

The ones that it has were chosen without a card.
"""

from collections.abc import Iterator
from functools import partial
from itertools import cycle, product

import torch
from torch import Tensor

from benchmarks.gpu import card
from benchmarks.gpu.session import Session
from flux.transformers.float8 import empty_float8, store

SHAPES = ((3072, 3072), (3072, 15360))  # the most frequent one, and that with the longest rows
RANKS = (8, 16, 32)
COPIES = 8  # of a weight, in turn: 226 MB or more, which no L2 cache holds
TILES = {
    "bf16": ((64, 128, 4), (64, 128, 8), (64, 64, 4), (128, 128, 8), (64, 256, 8)),
    "fp8": ((16, 128, 4), (16, 128, 8), (16, 256, 4), (16, 256, 8), (16, 512, 8), (32, 128, 4)),
}
"""Rows, columns and warps; the first is the one in use."""
Tensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def tiles(session: Session) -> None:
    """Microseconds of the kernel for one weight that comes from the device's memory, by tile."""
    for name, shape, rank in product(TILES, SHAPES, RANKS):
        found: dict[tuple[int, ...], float | str] = {}
        weights = cycle([_weight(session, name, shape, rank) for _ in range(COPIES)])
        for tile in TILES[name]:
            try:
                seconds = card.seconds_of(partial(_write_next, weights, tile), session.device)
                found[tile] = round(1e6 * seconds, 1)
            except Exception as error:  # Triton's are of many classes: one more result
                found[tile] = f"{type(error).__name__}: {error}"[:100]
        figures = {
            f"{name}, {shape[0]} x {shape[1]}, rank {rank}, {t}": v for t, v in found.items()
        }
        session.record("tiles", {f"{key}, us": value for key, value in figures.items()})


def _weight(session: Session, name: str, shape: tuple[int, int], rank: int) -> Tensors:
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


def _write_next(weights: Iterator[Tensors], tile: tuple[int, ...]) -> None:
    working, base, up, down, scales = next(weights)
    if working.device.type == "cuda":
        from flux.transformers.lora_kernel import Tile, write

        if not write(working, base, up, down, scales, tile=Tile(*tile)):
            raise NotImplementedError("not of a kind that the kernel writes")
    else:  # in a rehearsal
        store(working, base.float() + (up.float() * scales) @ down.float())
