"""What trains the miniature: its world, stages that can be interrupted, and what they export."""

import random

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import load_file
from torch import nn

from lora.formats.adapter import Targets, load_adapter
from miniature import checkpoint
from miniature.training import adapters, autoencoder, flow, pool, render, text, world
from miniature.training.stage import Stage, weights

pytestmark = pytest.mark.training

TINY = checkpoint.Dimensions(
    double_blocks=1, single_blocks=1, heads=1, rope_axes=(4, 6, 6), vae_channels=(8, 8)
)


@pytest.fixture(autouse=True)
def gradients():
    """On, whatever an engine in this thread has left."""
    with torch.enable_grad():
        yield


@pytest.fixture(scope="module")
def models() -> checkpoint.Models:
    built = checkpoint.models(TINY, seed=0)
    for module in built.modules():
        module.float().requires_grad_(False)
    return built


@pytest.mark.parametrize("kind", ["plain", "single", "pair"])
def test_no_caption_of_a_held_out_scene_is_trained_on(kind):
    rng = random.Random(0)
    trained = [world.sample(rng, kind) for _ in range(400)]
    kept = [world.sample(rng, kind, held_out=True) for _ in range(100)]
    combination = [
        {(s.background, *((o.colour, o.shape) for o in s.objects)) for s in scenes}
        for scenes in (trained, kept)
    ]
    assert not combination[0] & combination[1]
    assert len(combination[1]) > 10


def test_captions_name_what_the_scene_shows_in_words_that_are_one_token_each():
    rng = random.Random(1)
    tokenizer = checkpoint.t5_tokenizer()
    unknown = 0
    for _ in range(300):
        scene = world.sample(rng, rng.choice(("plain", "pair")))
        said = world.caption(rng, scene).lower()
        for thing in scene.objects:
            for name in (thing.colour, thing.shape):
                assert any(word in said for word in world.SYNONYMS[name]), said
        known = [word for word in said.strip(".").replace(",", "").split() if word.isalpha()]
        unknown += sum(len(tokenizer(word).input_ids) > 2 for word in known)
    assert 0 < unknown < 60  # the gibberish that captions are salted with, and nothing else


def test_a_picture_shows_its_scene():
    thing = world.Object("square", "red", 0.25, 0.5, 0.2)
    picture = render.render(world.Scene(("blue",), (thing,), sizes=("",), places=(None,)), 256, 128)
    assert picture.shape == (128, 256, 3)
    assert np.array_equal(picture[64, 64], render.colour("red"))
    assert np.array_equal(picture[64, 192], render.colour("blue"))
    area = (picture == render.colour("red")).all(-1).sum() / 128**2
    half = 1.1 * 0.2 / 2**0.5
    assert area == pytest.approx((2 * half) ** 2, rel=0.05)


def test_guidance_stretches_contrast_monotonely():
    spread = [np.ptp(render.colour("red", guidance)) for guidance in (0, 1.5, 3, 6, 10)]
    assert spread == sorted(spread)
    assert spread[0] < 0.6 * spread[2] < 0.6 * spread[-1]


def losses(module, step):
    generator = torch.Generator().manual_seed(step)
    batch = torch.randn(8, 4, generator=generator)
    return {"loss": (module(batch) - batch.flip(1)).square().mean()}


class StoppedError(Exception):
    pass


def test_an_interrupted_stage_goes_on_as_if_nothing_had_happened(tmp_path):
    def run(name: str, stop: int | None = None) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        module = nn.Linear(4, 4)
        stage = Stage(tmp_path / name, "stage", {"module": module}, 40, 1e-2, decay=0.9)

        def loss(step: int) -> dict[str, torch.Tensor]:
            if step == stop:
                stage.save()
                raise StoppedError
            return losses(module, step)

        if stop is None:
            stage.run(loss)
            return module.state_dict()
        with pytest.raises(StoppedError):
            stage.run(loss)
        return run(name)

    whole, resumed = run("whole"), run("interrupted", stop=17)
    for key, value in whole.items():
        assert torch.equal(value, resumed[key])
    assert torch.equal(weights(tmp_path / "whole", "stage", "module")["weight"], whole["weight"])


def test_balanced_latents_return_the_same_picture(models):
    built = checkpoint.models(TINY, seed=3)
    vae = built.vae.float()
    pictures = autoencoder.crops(random.Random(0), 2, 64)
    with torch.no_grad():
        before = vae.decode(vae.encode(pictures).latent_dist.mean).sample
        autoencoder.balance(vae, autoencoder.crops(random.Random(1), 8, 64))
        latents = vae.encode(pictures).latent_dist.mean
        after = vae.decode(latents).sample
    inside = (..., slice(8, -8), slice(8, -8))  # the border's padding differs
    assert torch.allclose(before[inside], after[inside], atol=2e-2)
    scaled = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    assert 0.3 < scaled.std() < 3


def test_pool_keeps_the_latents_of_the_scenes_that_it_names(models, tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "SHARD", 6)
    pool.make(models.vae, tmp_path, (64, 64), 3)  # and another process the others
    batch = pool.Pool(tmp_path).sample(random.Random(0), (64, 64), 4, ("pair",))
    assert all(len(example.scene.objects) == 2 for example in batch)
    example = batch[0]
    picture = render.render(example.scene, 64, 64, example.guidance)
    expected = models.vae.encode(torch.from_numpy(picture).movedim(-1, 0)[None]).latent_dist.mean[0]
    expected = (expected - models.vae.config.shift_factor) * models.vae.config.scaling_factor
    assert (example.latents - expected).abs().mean() < 0.05  # half precision, bf16 convolutions
    with pytest.raises(FileNotFoundError, match="no latents of"):
        pool.Pool(tmp_path).sample(random.Random(0), (128, 64), 1, ("pair",))


@torch.no_grad()
def test_t5_does_not_see_how_far_padding_reaches():
    models = checkpoint.models(TINY, seed=0)
    models.t5.float()
    text.steady_padding(models.t5)
    texts = ["a red circle on a blue background"]
    short, long = (
        models.t5(text.tokens(models.t5_tokenizer, texts, length)).last_hidden_state
        for length in (128, 512)
    )
    assert torch.allclose(short[:, :12], long[:, :12], atol=1e-5)


def test_schnell_begins_as_dev_at_guidance_3(models):
    dev, schnell = models.dev, models.schnell
    flow.fold_guidance(dev, schnell)
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(1, 16, dev.config.in_channels, generator=generator),
        "encoder_hidden_states": torch.randn(1, 4, TINY.t5_width, generator=generator),
        "pooled_projections": torch.randn(1, TINY.clip_width, generator=generator),
        "timestep": torch.tensor([0.7]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(4, 3),
        "return_dict": False,
    }
    expected = dev(**inputs, guidance=torch.tensor([3.0]))[0]
    assert torch.allclose(schnell(**inputs)[0], expected, atol=1e-4)
    assert not torch.allclose(dev(**inputs, guidance=torch.tensor([9.0]))[0], expected, atol=1e-3)


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # T5's norm under autocast
def test_a_training_step_lowers_the_loss_of_a_scene(models):
    transformer = FluxTransformer2DModel.from_config(models.dev.config)
    encoders = flow.TextEncoders(models.clip, models.clip_tokenizer, models.t5, models.t5_tokenizer)
    scene = world.sample(random.Random(0), "plain")
    latents = pool.encode(models.vae, [render.render(scene, 32, 32)] * 8)
    batch = [pool.Example(scene, 3.0, row) for row in latents]
    flow.quiet_start(transformer)
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=3e-3)
    seen = []
    for step in range(40):
        generator = torch.Generator().manual_seed(step % 4)
        when = flow.LAYOUT.sample(generator, len(batch))
        loss = flow.flow_loss(transformer, encoders, batch, random.Random(0), when, generator)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.item())
    assert np.mean(seen[-4:]) < 0.7 * np.mean(seen[:4])


def test_what_lies_about_an_outline_is_what_weighs_more():
    thing = world.Object("circle", "red", 0.5, 0.5, 0.25)
    scene = world.Scene(("blue",), (thing,), sizes=("",), places=(None,))
    found = flow.near_outlines(scene, 32, 16).reshape(16, 32)  # 32 x 16 tokens
    area, alike = np.pi * (0.95 * 0.25 * 16) ** 2, (0.28 / 0.25) ** 2  # its own; a medium one's
    assert found.sum() == pytest.approx(alike * area * (1.25**2 - 0.75**2), rel=0.05)
    assert found[8, 16 + 3] > 0.9 * alike  # 3 to 4 tokens from the middle
    assert found[8, 16] == found[0, 0] == 0


def test_both_adapter_formats_hold_the_same_deltas(models, tmp_path):
    transformer = FluxTransformer2DModel.from_config(models.dev.config)
    config = LoraConfig(r=2, lora_alpha=2, target_modules=adapters.LAYERS, init_lora_weights=False)
    inject_adapter_in_model(config, transformer)
    factors = {k: v.detach() for k, v in get_peft_model_state_dict(transformer).items()}
    trainer, kohya = tmp_path / "trainer.safetensors", tmp_path / "kohya.safetensors"
    adapters.save_as_trainer(factors, trainer)
    adapters.save_as_kohya(factors, kohya)
    assert all(key.startswith("lora_unet_") for key in load_file(kohya))
    shapes = {name: parameter.shape for name, parameter in models.dev.named_parameters()}
    one, other = (
        load_adapter(path, "digest", Targets({"transformer": shapes})) for path in (trainer, kohya)
    )
    assert one.parameters == other.parameters
    assert len(one.parameters) == len(factors) // 2
    for component, name in one.parameters:
        sums = [torch.zeros(shapes[name]) for _ in range(2)]
        for adapter, scratch in zip((one, other), sums, strict=True):
            adapter.add_to(scratch, component, name, lambda *_: torch.empty(0), 1.0)
        factor = name.removesuffix(".weight")
        up, down = (factors[f"{factor}.lora_{side}.weight"].bfloat16().float() for side in "BA")
        torch.testing.assert_close(sums[0], up @ down)
        torch.testing.assert_close(sums[1], up @ down)
