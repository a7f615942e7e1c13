"""The attention backend: diffusers' names, tried before they serve."""

import itertools

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.attention_dispatch import AttentionBackendName

from flux.sampling import ASPECT_RATIOS
from flux.transformers.attention import attend, build_plans, needs_plans, set_attention_backend
from flux.transformers.skeleton import allocate, skeleton
from tests.support import tiny
from tests.support.inputs import UNCHECKED
from tests.support.predictor import without_decoding
from weights.serving.settings import SettingsError

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
        (generated,) = model(
            hidden_states=torch.randn(1, 12, 16, generator=generator),
            encoder_hidden_states=torch.randn(1, 5, 24, generator=generator),
            pooled_projections=torch.randn(1, 20, generator=generator),
            timestep=torch.tensor([0.5]),
            guidance=torch.tensor([3.0]),
            img_ids=torch.zeros(12, len(size.rope)),
            txt_ids=torch.zeros(5, len(size.rope)),
            return_dict=False,
        )
    return generated


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


def test_a_device_without_cudnn_builds_no_plans(monkeypatch) -> None:
    cuda, native = torch.device("cuda"), AttentionBackendName.NATIVE
    assert not needs_plans(native, CPU)
    for capability, expected in [((9, 0), True), ((8, 9), False)]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert needs_plans(native, cuda) == expected
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert not needs_plans(AttentionBackendName.FLASH, cuda)
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: False)
    assert not needs_plans(native, cuda)


def test_setup_attends_in_every_size_that_requests_will_have(start, monkeypatch, caplog) -> None:
    """What is attended over in setup, by what the blocks attend over in requests."""
    seen: list[int] = []

    def attention(query: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        seen.append(query.shape[-2])
        return query  # what is attended to does not matter

    monkeypatch.setattr("flux.load.needs_plans", lambda *_: True)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    generate = start()
    assert "numbers of tokens tried in" in caplog.text
    in_setup = set(seen)
    generated: list[int] = []

    def step(_: object, hidden_states: torch.Tensor, **options: object) -> tuple[torch.Tensor]:
        generated.append(hidden_states.shape[1] + options["txt_ids"].shape[0])
        return (hidden_states,)  # what is generated does not matter

    without_decoding(monkeypatch)
    monkeypatch.setattr(FluxTransformer2DModel, "forward", step)
    quick = {"num_inference_steps": 1, **UNCHECKED}
    for model in ("dev", "schnell"):
        for ratio in ASPECT_RATIOS:
            generate(model=model, aspect_ratio=ratio, megapixels="0.25", **quick)
    generate(aspect_ratio="21:9", **quick)
    assert len(generated) == 23
    assert set(generated) <= in_setup


@pytest.mark.parametrize("joined", [False, True])
def test_setup_attends_in_every_layout_that_blocks_have(model, monkeypatch, joined: bool) -> None:
    seen: set[object] = set()
    attention = torch.nn.functional.scaled_dot_product_attention

    def spy(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: object):
        seen.add((query.shape, query.stride(), key.stride(), value.stride()))
        return attention(query, key, value, **options)

    working = skeleton(model, joined=joined)
    allocate(working, lambda _, shape, dtype: torch.ones(shape, dtype=dtype))
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    attend(working, AttentionBackendName.NATIVE, 12 + 5, CPU, torch.float32)
    in_setup = set(seen)
    seen.clear()
    step(working)
    assert seen == in_setup
    assert len(seen) == 1 + joined


def test_plans_take_no_longer_than_the_time_for_them(caplog) -> None:
    clock, tried = itertools.count(step=15), []
    build_plans(tried.append, 16, lambda: float(next(clock)))
    assert tried == [4096 + 512]  # the default size
    assert "plans for 1 of 19 numbers of tokens took 30.0 s" in caplog.text
