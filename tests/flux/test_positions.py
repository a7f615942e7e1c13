"""Rotary embeddings: computed once for an image, and those of its own size."""

from collections.abc import Iterator

import pytest
import torch
from PIL import Image

from flux.engine import Engine
from flux.request import Inputs, make_request
from flux.transformers.pool import Transformers
from tests.flux.engines import parts
from tests.support.pictures import same
from weights.serving.settings import Settings
from weights.serving.timing import Stopwatch


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def made() -> tuple[Engine, Transformers]:
    pipelines, transformers = parts(Settings(checkpoint="nano", device="cpu"))
    return Engine(pipelines, transformers), transformers


def generate(engine: Engine, **inputs) -> list[Image.Image]:
    quick = {"prompt": "a hat", "megapixels": "0.25", "num_inference_steps": 3, "seed": 1}
    request = make_request(Inputs(**quick | inputs), Settings())
    return list(engine.generate(request, (), Stopwatch(), lambda: None))


def test_they_are_computed_once_for_an_image() -> None:
    engine, transformers = made()
    calls = []
    embed = transformers.modules["dev", "bf16"].pos_embed.embed
    embed.register_forward_hook(lambda *_: calls.append(1))
    generate(engine, num_outputs=2)
    assert len(calls) == 2


def test_they_are_those_of_the_size_also_where_as_many_tokens_lie_otherwise() -> None:
    sizes = [{"aspect_ratio": ratio, "num_inference_steps": 1} for ratio in ("16:9", "9:16")]
    alone = [generate(made()[0], **size)[0] for size in sizes]
    engine, _ = made()
    generated = [generate(engine, **size)[0] for size in sizes]
    assert all(same(a, b) for a, b in zip(alone, generated, strict=True))
