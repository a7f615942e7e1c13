"""The attention backend: diffusers' names, tried before they serve."""

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName

from flux.attention import set_attention_backend
from tests import tiny
from weights.settings import SettingsError

CPU = torch.device("cpu")


@pytest.fixture
def model():
    found = tiny.modules(tiny.SIZES[0])["transformer"]
    yield found
    set_attention_backend([found], "auto", CPU, torch.float32)  # diffusers keeps it globally too


def backends(model) -> set[str]:
    return {block.attn.processor._attention_backend for block in model.transformer_blocks}


def step(model) -> torch.Tensor:
    size = tiny.SIZES[0]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        (drawn,) = model(
            hidden_states=torch.randn(1, 12, 16, generator=generator),
            encoder_hidden_states=torch.randn(1, 5, 24, generator=generator),
            pooled_projections=torch.randn(1, 20, generator=generator),
            timestep=torch.tensor([0.5]),
            guidance=torch.tensor([3.0]),
            img_ids=torch.zeros(12, len(size.rope)),
            txt_ids=torch.zeros(5, len(size.rope)),
            return_dict=False,
        )
    return drawn


def test_by_itself_it_is_pytorchs_own_whatever_diffusers_was_set_to(model) -> None:
    model.set_attention_backend("_native_math")
    set_attention_backend([model], "auto", CPU, torch.float32)
    assert backends(model) == {AttentionBackendName.NATIVE}


@pytest.mark.parametrize("name", ["_native_math", "_native_flash"])
def test_a_backend_that_this_machine_has_serves_and_agrees(model, name: str) -> None:
    expected = step(model)
    set_attention_backend([model], name, CPU, torch.float32)
    assert backends(model) == {AttentionBackendName(name)}
    torch.testing.assert_close(step(model), expected, rtol=1e-4, atol=1e-4)


def test_an_unknown_name_lists_the_choices(model) -> None:
    with pytest.raises(SettingsError, match=r"FLUX_ATTENTION_BACKEND=fast: no such .*flash.*sage"):
        set_attention_backend([model], "fast", CPU, torch.float32)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("_native_cudnn", "No viable backend"),  # PyTorch has it, this device does not
        ("xformers", "install `xformers"),  # a package that is not here
    ],
)
def test_one_that_is_not_here_says_what_to_do(model, name: str, reason: str) -> None:
    expected = step(model)
    with pytest.raises(SettingsError, match=rf"={name}: cannot be used here, on cpu.*{reason}"):
        set_attention_backend([model], name, CPU, torch.float32)
    assert torch.equal(step(model), expected)
