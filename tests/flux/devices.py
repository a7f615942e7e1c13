"""The engine on a card that computes nothing; test_card.py runs this.

All tensors are fake: they have a shape, a dtype and a device, and no values. An operator that
meets tensors on two devices raises, as on a card and unlike on a CPU, which has but one device.
Writes each case that went through, with what is offloaded.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily

import flux.components
import flux.engine
import flux.load
import flux.transformers.pool
from flux.engine import Adapters, Engine
from flux.request import Inputs, make_request
from lora.formats.adapter import Adapter, load_adapter
from lora.formats.keys import Targets
from tests.flux import card, merging
from tests.flux.engines import parts
from tests.support import tiny
from tests.support.adapters import adapter
from tests.support.pictures import colours
from weights.serving.cancel import never_cancelled
from weights.serving.settings import Settings
from weights.serving.timing import Stopwatch

MODE = FakeTensorMode(allow_non_fake_inputs=True)
WIDTH = 160  # of the embedded miniature
QKV = "double_blocks.0.img_attn.qkv"


def outside(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, with real tensors on the host."""

    def call(*arguments: Any, **options: Any) -> Any:
        with unset_fake_temporarily():
            return function(*arguments, **options)

    return call


def with_fakes(load: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """The same loader, for modules of fake tensors on the host; tied weights stay tied."""

    def call(*arguments: Any, **options: Any) -> nn.Module:
        module, found = load(*arguments, **options), {}
        for owner in module.modules():
            for name, value in owner._parameters.items():
                if value is not None:
                    fake = nn.Parameter(torch.empty(value.shape, dtype=value.dtype), False)
                    owner._parameters[name] = found.setdefault(value, fake)
            for name, value in owner._buffers.items():
                owner._buffers[name] = torch.empty(value.shape, dtype=value.dtype)
        return module

    return call


def set_data(tensor: FakeTensor, value: Tensor) -> None:
    torch._C.TensorBase.data.__set__(tensor, value)
    tensor.fake_device = value.device


def prepare_torch() -> None:
    """Let `.data` take a tensor to another device, and no fake tensor know its values."""
    FakeTensor.data = property(torch._C.TensorBase.data.__get__, set_data)
    converter = fake_tensor.FakeTensorConverter
    convert = converter.from_real_tensor
    converter.from_real_tensor = lambda *a, **k: convert(*a, **k | {"make_constant": False})
    tensor = torch.tensor
    torch.tensor = lambda data, **options: (
        torch.stack(data)
        if isinstance(data, list) and any(isinstance(each, Tensor) for each in data)
        else tensor(data, **options)
    )


def prepare_libraries() -> None:
    """Read files and pictures outside, and replace what looks at a tensor's values."""
    for module in (flux.components, flux.load):
        module.load_component = outside(module.load_component)
    flux.load.load_module = with_fakes(flux.load.load_module)
    flux.load.load_skeleton = outside(flux.load.load_skeleton)
    flux.transformers.pool.skeleton = outside(flux.transformers.pool.skeleton)
    flux.engine.soft_alpha = outside(flux.engine.soft_alpha)
    read = outside(VaeImageProcessor.preprocess)
    VaeImageProcessor.preprocess = lambda *a, **k: MODE.from_tensor(read(*a, **k))
    VaeImageProcessor.pt_to_numpy = staticmethod(
        lambda images: np.zeros((images.shape[0], *images.shape[2:], 3), np.float32)
    )
    FlowMatchEulerDiscreteScheduler.scale_noise = lambda scheduler, sample, _, noise: (
        scheduler.sigmas[0] * noise + (1 - scheduler.sigmas[0]) * sample
    )
    AutoencoderKL.to = lambda module, **_: module  # its memory format, which a card leaves


def adapters(engine: Engine, directory: Path) -> list[Adapter]:
    """LoRA, DoRA with a bias, LoKr and OFT."""
    kron = "lycoris_single_transformer_blocks_0_proj_mlp"
    files = {
        "lora": adapter(1),
        "dora": merging.lora(QKV, 3 * WIDTH, WIDTH, 4, 5)
        | {
            f"{QKV}.dora_scale": torch.full((1, WIDTH), 0.7),
            f"{QKV}.diff_b": torch.ones(3 * WIDTH),
        },
        "lokr": {f"{kron}.lokr_w1": torch.ones(8, 2), f"{kron}.lokr_w2": torch.ones(80, 80)},
        "oft": {f"{QKV}.oft_blocks": 0.1 * torch.ones(4, 3 * WIDTH // 4, 3 * WIDTH // 4)},
    }
    return [
        load_adapter(tiny.save(directory / name, tensors), name, Targets(engine.shapes))
        for name, tensors in files.items()
    ]


def cases(found: list[Adapter], directory: Path) -> Iterator[tuple[dict[str, Any], Adapters]]:
    """Each mode, variant and precision, and each kind of adapter; the last has none again."""
    colours(160, 96).save(directory / "picture.png")
    Image.linear_gradient("L").save(directory / "mask.png")
    image = {"image": directory / "picture.png", "prompt_strength": 0.6}
    yield {}, ()
    yield image, [(found[0], 1.0)]
    yield {**image, "mask": directory / "mask.png"}, [(found[0], 0.5)]
    yield {**image, "model": "schnell"}, [(each, 1.0) for each in found]
    for each in found:
        yield {"go_fast": True}, [(each, 1.0)]
    yield {"go_fast": True, "model": "schnell"}, [(found[0], 1.0), (found[1], -0.5)]
    yield {"go_fast": True}, ()


def main() -> None:
    card.pretend()
    prepare_torch()
    prepare_libraries()
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory() as name, MODE:
        for offload in ("none", "t5", "all"):
            settings = Settings(
                checkpoint="nano", device="cuda", offload=offload, lora_device_bytes=0
            )
            engine = Engine(*parts(settings))
            with unset_fake_temporarily():
                read = adapters(engine, Path(name))
            found = [each.placed(each.parameters, MODE.from_tensor) for each in read]
            every = 1 if offload == "none" else 3
            chosen = cases(found, Path(name))
            for inputs, desired in islice(chosen, 0, None, every):
                quick = {"prompt": "a hat", "megapixels": "0.25", "num_inference_steps": 2}
                request = make_request(Inputs(**quick | inputs), settings)
                (image,) = engine.generate(request, desired, Stopwatch(), never_cancelled)
                assert image.size == (request.width, request.height)
                sys.stdout.write(
                    f"{offload} {engine.device} {'-'.join(request.key)} {request.mode.name}\n"
                )


if __name__ == "__main__":
    main()
