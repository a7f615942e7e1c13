"""Deployments that are short of memory: the same images, and no step that waits for a copy."""

import itertools
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from PIL import Image
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import T5EncoderModel

from flux.memory.budget import bytes_of
from flux.transformers.merge import WorkingWeights
from flux.transformers.one_pass import OnePass
from tests.flux.low_rank import Kernel
from tests.flux.streams import Late
from tests.support.adapters import adapter
from tests.support.embedded import diffusers
from tests.support.pictures import data_uri, difference, largest_difference, same


@cache
def gigabytes(name: str) -> float:
    """What FLUX_DEVICE_MEMORY_GB must be for dev or schnell to fit in bf16, and no more."""
    pipeline = diffusers()[name]
    shared = (pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2)
    return sum(bytes_of(module) for module in (*shared, pipeline.transformer)) / 1e9 + 1e-6


def test_a_device_with_room_for_one_serves_all_to_the_bit(start, usual, caplog) -> None:
    quick = {"num_inference_steps": 1}
    narrow = start(FLUX_DEVICE_MEMORY_GB=str(gigabytes("dev")))
    for model, go_fast in [("schnell", False), ("dev", True), ("dev", False), ("schnell", True)]:
        request = {"model": model, "go_fast": go_fast, **quick}
        assert same(narrow(**request)[0], usual(**request)[0])
    assert "dev bf16 leaves cpu" in caplog.text


def test_a_device_too_small_for_one_says_so(start) -> None:
    room = str(gigabytes("dev") - 0.0005)
    generate = start(FLUX_DEVICE_MEMORY_GB=room)
    with pytest.raises(RuntimeError, match=r"dev bf16 takes .* use the other precision"):
        generate()
    assert generate(go_fast=True)
    with pytest.raises(RuntimeError, match="raise FLUX_DEVICE_MEMORY_GB"):
        start(FLUX_DEVICE_MEMORY_GB="0.0001")


@pytest.mark.parametrize("times", [1, 2])
def test_out_of_memory_in_a_step(start, monkeypatch, caplog, times) -> None:
    generate = start()
    expected, fast = generate()[0], generate(go_fast=True)[0]
    forward, remaining = FluxTransformer2DModel.forward, iter(range(times))

    def runs_out(*args: object, **options: object) -> object:
        if next(remaining, None) is not None:
            raise torch.OutOfMemoryError("CUDA out of memory (pretended)")
        return forward(*args, **options)

    monkeypatch.setattr(FluxTransformer2DModel, "forward", runs_out)
    if times == 1:
        assert same(generate()[0], expected)
    else:
        with pytest.raises(RuntimeError, match=r"Out of memory on cpu, also with dev bf16 alone"):
            generate()
        assert same(generate()[0], expected)
    assert "dev fp8 leaves cpu" in caplog.text
    assert same(generate(go_fast=True)[0], fast)


def test_out_of_memory_in_the_text_encoders(start, usual, monkeypatch, caplog) -> None:
    expected = usual(prompt="a heart")[0]
    forward, remaining = T5EncoderModel.forward, iter(range(1))

    def runs_out(*args: object, **options: object) -> object:
        if next(remaining, None) is not None:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED (pretended)")
        return forward(*args, **options)

    monkeypatch.setattr(T5EncoderModel, "forward", runs_out)
    assert same(start()(prompt="a heart")[0], expected)
    assert "Out of memory on cpu, trying with less" in caplog.text


def test_out_of_memory_in_a_merge_into_the_text_encoders(start, usual, monkeypatch) -> None:
    """They come first, so the first merge is one into them."""
    expected, generate = usual()[0], start()
    reconcile, remaining = WorkingWeights.reconcile, iter(range(1))

    def runs_out(*args: object) -> object:
        if next(remaining, None) is not None:
            raise torch.OutOfMemoryError("CUDA out of memory (pretended)")
        return reconcile(*args)

    monkeypatch.setattr(WorkingWeights, "reconcile", runs_out)
    assert same(generate()[0], expected)


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for the device: values and shapes read back from it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.found.append(str(function))
        return function(*args, **kwargs or {})


def between_steps(monkeypatch, enter: Callable[[], object], leave: Callable[[], object]) -> None:
    """Enter something after the first of four steps' forward pass, and leave it after the third."""
    forward, numbers = FluxTransformer2DModel.forward, itertools.count(1)

    def step(*args: object, **options: object) -> object:
        number, answer = next(numbers), forward(*args, **options)
        if number in (1, 3):
            (enter if number == 1 else leave)()
        return answer

    monkeypatch.setattr(FluxTransformer2DModel, "forward", step)


@pytest.mark.parametrize("go_fast", [False, True])
def test_no_step_reads_from_the_device(start, monkeypatch, go_fast) -> None:
    generate, reads = start(FLUX_FP8_ACTIVATIONS="fp8"), Reads()
    between_steps(monkeypatch, reads.__enter__, lambda: reads.__exit__(None, None, None))
    assert generate(go_fast=go_fast, num_inference_steps=4)
    assert reads.found == []


def test_all_copies_are_made_before_a_step_is_generated(start, usual, monkeypatch) -> None:
    """Also those that a stream makes as late as it may, of transformers that take turns."""
    expected = [usual(model=model)[0] for model in ("schnell", "dev")]
    stream, forward = Late(), FluxTransformer2DModel.forward

    def check(*args: object, **options: object) -> object:
        assert stream.under_way == []
        return forward(*args, **options)

    monkeypatch.setattr(FluxTransformer2DModel, "forward", check)
    monkeypatch.setattr("flux.memory.offload.copy_stream", lambda _: stream)
    generate = start(FLUX_DEVICE_MEMORY_GB=str(gigabytes("dev")))
    assert same(generate(model="schnell")[0], expected[0])
    assert same(generate(model="dev")[0], expected[1])
    assert stream.targets


class FromFiles(Late):
    """Carries what a checkpoint's own module holds; all else is on the device."""

    def needs_copy(self, source: Tensor) -> bool:
        return isinstance(source, nn.Parameter)


def test_setup_reads_every_weight_that_it_needs_once_and_no_other(
    start, usual, monkeypatch
) -> None:
    """As on a card of 80 GB: dev in both precisions, and its base weights."""
    expected = usual()[0]
    shared, weights = Late(pageable=True), FromFiles(pageable=True)
    monkeypatch.setattr("flux.memory.staging.copy_stream", lambda _: shared)
    monkeypatch.setattr("flux.memory.offload.copy_stream", lambda _: weights)
    pipeline = diffusers()["dev"]
    dev = bytes_of(pipeline.transformer)
    parts = (pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2)
    room = (2.5 * dev + sum(map(bytes_of, parts))) / 1e9
    generate = start(FLUX_DEVICE_MEMORY_GB=str(room))
    assert shared.sent == sum(map(bytes_of, parts))
    assert weights.sent == dev
    assert same(generate()[0], expected)
    assert generate(replicate_weights=data_uri(save(adapter(1))))
    assert same(generate()[0], expected)
    assert weights.sent == dev  # swaps read the device


@pytest.mark.parametrize("go_fast", [False, True])
def test_adapters_on_the_device_generate_the_same(start, usual, monkeypatch, go_fast) -> None:
    """As on a card, with a stand-in for its kernel."""
    style, kernel = data_uri(save(adapter(1))), Kernel()
    request = {"go_fast": go_fast, "num_inference_steps": 1}
    monkeypatch.setattr(
        "flux.load.one_pass", lambda _, limit: OnePass(kernel, limit, torch.Tensor.clone)
    )
    there = start()
    compiled, kernel.written = kernel.written, 0
    assert compiled == 4  # in setup: two forms for bf16 and for float8 weights
    for weights in (style, None, style):
        images = [generate(replicate_weights=weights, **request)[0] for generate in (usual, there)]
        assert difference(*images) < 1
        assert weights or same(*images)
    merged = len(adapter(1)) // 2  # two factors for each weight
    assert kernel.written == (3 if go_fast else 2) * merged  # float8 weights are restored by it too


def test_adapters_have_a_part_of_the_device(start, monkeypatch) -> None:
    monkeypatch.setattr(
        "flux.load.one_pass", lambda _, limit: OnePass(Kernel(), limit, torch.Tensor.clone)
    )
    room, theirs = gigabytes("dev"), 0.0005
    for total, fits in ((room, False), (room + theirs, True)):
        generate = start(FLUX_DEVICE_MEMORY_GB=str(total), LORA_DEVICE_MEMORY_GB=str(theirs))
        if fits:
            assert generate()
            continue
        with pytest.raises(RuntimeError, match="dev bf16 takes"):
            generate()


@pytest.fixture(scope="module")
def not_offloaded(usual) -> list[tuple[dict[str, Any], Image.Image]]:
    """Requests that take turns, each with a prompt of its own, and their images."""
    style = {"replicate_weights": data_uri(save(adapter(1)))}
    requests = [
        {"model": "dev", "prompt": "one", **style},
        {"model": "dev", "prompt": "two", "go_fast": True, **style},
        {"model": "schnell", "prompt": "three", "go_fast": True},
        {"model": "dev", "prompt": "four"},
    ]
    return [(request, usual(**request)[0]) for request in requests]


@pytest.mark.parametrize("offload", ["t5", "all"])
def test_offloaded_weights_generate_the_same(start, not_offloaded, caplog, offload) -> None:
    """But for rounding, if the transformer multiplies query, key and value one by one."""
    there = start(FLUX_OFFLOAD=offload)
    assert "text_encoder_2" in caplog.text
    assert ("transformer: on the host, brought layer by layer" in caplog.text) == (offload == "all")
    for number, (request, expected) in enumerate(not_offloaded):
        most = largest_difference(there(**request)[0], expected)
        assert most <= (1 if offload == "all" else 0), number


@pytest.mark.gpu
@pytest.mark.parametrize("offload", ["none", "t5", "all"])
def test_both_variants_on_a_gpu(start, offload) -> None:
    generate = start(FLUX_DEVICE="cuda", FLUX_OFFLOAD=offload)
    cpu = start()
    for model in ("dev", "schnell"):
        once, again = (generate(model=model)[0] for _ in range(2))
        assert difference(once, cpu(model=model)[0]) < 8
        assert same(once, again)
        fast = generate(model=model, go_fast=True)[0]
        assert difference(fast, cpu(model=model, go_fast=True)[0]) < 8


@pytest.mark.gpu
@pytest.mark.parametrize("go_fast", [False, True])
def test_no_step_waits_for_a_gpu(start, monkeypatch, go_fast) -> None:
    generate, mode = start(FLUX_DEVICE="cuda"), torch.cuda.set_sync_debug_mode
    between_steps(monkeypatch, partial(mode, "error"), partial(mode, "default"))
    try:
        assert generate(go_fast=go_fast, num_inference_steps=4)
    finally:
        mode("default")
