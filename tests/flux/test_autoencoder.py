"""Decoding: whole where there is memory for it, in tiles where there is not."""

from collections.abc import Iterator

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from flux.autoencoder import TILE
from flux.engine import Engine
from flux.memory.residency import BudgetError
from flux.request import Inputs, make_request
from tests.flux.engines import parts
from tests.support.pictures import difference, same
from weights.serving.settings import Settings
from weights.serving.timing import Stopwatch

WIDE = {"aspect_ratio": "custom", "width": 1440, "height": 256}  # 90 x 16 latents


@pytest.fixture(scope="module")
def engine_and_decoder() -> Iterator[tuple[Engine, nn.Module]]:
    settings = Settings(checkpoint="nano", device="cpu")
    pipelines, transformers = parts(settings)
    with torch.no_grad():
        yield Engine(pipelines, transformers), pipelines["dev"].vae.decoder


def generate(engine: Engine, **inputs: object) -> Image.Image:
    request = make_request(Inputs("a hat", num_inference_steps=1, seed=1, **inputs), Settings())
    (image,) = engine.generate(request, (), Stopwatch(), lambda: None)
    return image


class Memory:
    """Of a device that holds the decoding of so many columns of latents."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.calls: list[int] = []

    def __call__(self, _: nn.Module, arguments: tuple[Tensor]) -> None:
        self.calls.append(arguments[0].shape[-1])
        if self.calls[-1] > self.columns:
            raise torch.OutOfMemoryError("CUDA out of memory (pretended)")


def test_tiles_where_memory_asks_for_them(engine_and_decoder, caplog) -> None:
    engine, decoder = engine_and_decoder
    whole = generate(engine, **WIDE)
    memory = Memory(TILE)
    handle = decoder.register_forward_pre_hook(memory)
    tiled = generate(engine, **WIDE)
    assert memory.calls[:2] == [90, 90]  # alone with its transformer, it is tried once more
    assert max(memory.calls[2:]) <= TILE
    assert "Decoding in tiles: CUDA out of memory" in caplog.text
    assert tiled.size == whole.size
    assert 0 < difference(tiled, whole) < 2
    handle.remove()
    assert same(generate(engine, **WIDE), whole)  # and not longer than that


def test_what_is_no_lack_of_memory_is_not_tried_in_tiles(engine_and_decoder) -> None:
    engine, decoder = engine_and_decoder
    calls: list[object] = []

    def broken(*arguments: object) -> None:
        calls.append(arguments)
        raise ValueError("a bug")

    handle = decoder.register_forward_pre_hook(broken)
    with pytest.raises(ValueError, match="a bug"):
        generate(engine, **WIDE)
    handle.remove()
    assert len(calls) == 1


def test_no_memory_for_a_tile_either(engine_and_decoder) -> None:
    engine, decoder = engine_and_decoder
    handle = decoder.register_forward_pre_hook(Memory(8))
    with pytest.raises(BudgetError, match="Out of memory on cpu"):
        generate(engine, **WIDE)
    handle.remove()
    assert generate(engine, **WIDE).size == (1440, 256)
