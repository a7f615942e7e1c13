"""Compiled transformers through the predictor: no request makes a graph."""

import shutil
from collections.abc import Iterator
from itertools import cycle, product
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save
from torch._dynamo.utils import clear_compilation_metrics, counters, get_compilation_metrics

from flux.sampling import ASPECT_RATIOS
from flux.transformers.compile import graphs
from tests.support.adapters import adapter
from tests.support.inputs import UNCHECKED
from tests.support.pictures import colours, data_uri, difference, same
from tests.support.predictor import Generate, set_up_predictor, without_decoding


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """An empty directory for what is compiled."""
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler on this machine: inductor needs g++ for a CPU")
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def compiled(cache, tmp_path_factory) -> Iterator[Generate]:
    """A predictor that compiles, after its warm-up with an empty cache."""
    torch._dynamo.reset()
    clear_compilation_metrics()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # put back in the end: setup sets it
        outputs = tmp_path_factory.mktemp("outputs")
        before = graphs()
        generate = set_up_predictor(
            patch, outputs, FLUX_COMPILE="on", FLUX_CACHE_DIRECTORY=str(cache)
        )
        assert 4 <= graphs() - before <= 5  # two kinds of block in two precisions, the first single
        yield generate
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("pictures")
    sizes = {"picture": (160, 96), "other": (96, 208), "cell": (16, 16)}
    for name, size in sizes.items():
        colours(*size).save(directory / f"{name}.png")
    Image.linear_gradient("L").save(directory / "mask.png")
    return {path.stem: path for path in directory.iterdir()}


def test_setup_traces_each_graph_once(compiled) -> None:
    """Tracing is what a start with a kept cache still takes."""
    made = get_compilation_metrics()
    assert made
    assert not [each.co_name for each in made if each.restart_reasons]


def sizes() -> Iterator[dict[str, object]]:
    """Every ratio, megapixels, and custom sizes."""
    for ratio in ASPECT_RATIOS:
        yield {"aspect_ratio": ratio}
    yield {"megapixels": "1"}
    yield {"megapixels": "1", "aspect_ratio": "21:9", "guidance_scale": 7.5, "seed": 0}
    for width, height in [(256, 256), (1440, 256), (1024, 768)]:
        yield {"aspect_ratio": "custom", "width": width, "height": height}


def modes(pictures: dict[str, Path]) -> Iterator[dict[str, object]]:
    """Image to image and inpainting, numbers of outputs, adapters and steps."""
    one, two = (data_uri(save(adapter(seed))) for seed in (1, 2))
    yield {"image": pictures["picture"], "prompt_strength": 0.6, "num_inference_steps": 5}
    yield {"image": pictures["other"], "mask": pictures["mask"], "num_outputs": 2}
    yield {"image": pictures["cell"], "replicate_weights": one}
    yield {"replicate_weights": two, "lora_scale": 0.3, "extra_lora": one, "prompt": "a hat"}
    yield {"image": pictures["other"], "replicate_weights": one, "num_outputs": 4}


def test_no_request_makes_a_graph(compiled, pictures, monkeypatch) -> None:
    """Each size with one of the four transformers in turn, each mode and adapter with all."""
    without_decoding(monkeypatch)
    before, transformers = graphs(), list(product(["dev", "schnell"], [False, True]))
    requests = list(zip(sizes(), cycle(transformers), strict=False))
    requests += product(modes(pictures), transformers)
    quick = {"num_inference_steps": 1, **UNCHECKED}
    for inputs, (model, go_fast) in requests:
        compiled(**{"model": model, "go_fast": go_fast, **quick, **inputs})
        assert graphs() == before, (model, go_fast, inputs)


@pytest.mark.parametrize("go_fast", [False, True])
def test_a_compiled_image_is_close_to_the_eager_one(compiled, usual, go_fast: bool) -> None:
    """A mean of half a step of 255 in bf16 requests; float8 rounds at places of its own."""
    inputs = {"go_fast": go_fast, "num_inference_steps": 4}
    expected, generated = usual(**inputs)[0], compiled(**inputs)[0]
    assert difference(generated, expected) < (2 if go_fast else 0.5)
    assert (
        difference(generated, usual(**inputs, prompt="a black star on a yellow background")[0]) > 10
    )
    style = data_uri(save(adapter(1)))
    adapted = {**inputs, "replicate_weights": style}
    assert difference(compiled(**adapted)[0], usual(**adapted)[0]) < (2 if go_fast else 0.5)
    assert same(compiled(**inputs)[0], generated)


def test_a_second_start_finds_what_the_first_compiled(
    compiled, cache, monkeypatch, tmp_path
) -> None:
    torch._dynamo.reset()  # as in a new process
    missed = counters["inductor"]["fxgraph_cache_miss"]
    generate = set_up_predictor(
        monkeypatch, tmp_path, FLUX_COMPILE="on", FLUX_CACHE_DIRECTORY=str(cache)
    )
    assert counters["inductor"]["fxgraph_cache_miss"] == missed
    before = graphs()
    for model, go_fast in product(["dev", "schnell"], [False, True]):
        assert same(*(d(model=model, go_fast=go_fast)[0] for d in (generate, compiled)))
    assert graphs() == before
