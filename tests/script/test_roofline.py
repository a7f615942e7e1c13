"""The roofline's operations against torch's own counter, and its arithmetic by hand."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import roofline
from benchmarks.shared import flux1
from flux.transformers.skeleton import size


def counted(model, image: int, text: int) -> int:
    """Operations of a real forward pass on the meta device, by torch's counter."""
    half = {"dtype": torch.bfloat16, "device": "meta"}
    width = model.config.joint_attention_dim
    guidance = torch.ones(1, device="meta") if model.config.guidance_embeds else None
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(
            hidden_states=torch.ones(1, image, model.config.in_channels, **half),
            encoder_hidden_states=torch.ones(1, text, width, **half),
            pooled_projections=torch.ones(1, model.config.pooled_projection_dim, **half),
            timestep=torch.ones(1, device="meta"),
            guidance=guidance,
            img_ids=torch.zeros(image, 3, device="meta"),
            txt_ids=torch.zeros(text, 3, device="meta"),
        )
    return counter.get_total_flops()


@pytest.mark.parametrize(("variant", "image", "text"), [("dev", 4096, 512), ("schnell", 1024, 256)])
def test_operations_are_those_that_torch_counts(variant, image, text) -> None:
    model = flux1.transformer(variant)
    work = roofline.work_of_step(model, image, text, "bf16")
    assert work.float8 == 0
    assert work.bf16 == counted(model, image, text)
    quantized = roofline.work_of_step(model, image, text, "fp8")
    assert quantized.float8 + quantized.bf16 == work.bf16
    assert quantized.float8 > 0.75 * work.bf16


def test_the_models_have_the_published_sizes() -> None:
    def millions(module) -> int:
        return round(sum(parameter.numel() for parameter in module.parameters()) / 1e6)

    assert millions(flux1.transformer("dev")) == 11901
    assert millions(flux1.transformer("schnell")) == 11891
    assert millions(flux1.t5()) == 4762
    assert millions(flux1.clip()) == 123
    assert millions(flux1.vae()) == 84
    assert round(size(flux1.transformer("dev"), frozenset()) / 1e9, 1) == 23.8
    assert flux1.image_tokens(1024) == 4096


def test_the_bound_of_a_step() -> None:
    card = roofline.Card("test", bf16=100.0, fp8=200.0, bandwidth=10.0)
    work = roofline.Work(float8=400, bf16=100, bytes=35)
    assert roofline.bound(work, card) == (3.0, 3.5)
    without = roofline.Card("test", bf16=100.0, fp8=None, bandwidth=10.0)
    assert roofline.bound(work, without) == (5.0, 3.5)
