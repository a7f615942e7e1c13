"""The miniature checkpoint: the committed files, the builder and the tokenizers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FluxPipeline
from safetensors.torch import load_file
from transformers import CLIPTokenizer, T5Tokenizer

from flux.deployment import NANO
from miniature import checkpoint, vocabulary
from miniature.evaluation.measure import measure
from miniature.training.render import render
from miniature.training.world import Object, Scene
from tests.support.embedded import diffusers

VISIBLE = 1.0  # mean absolute difference of 8-bit pixels


def load(directory: Path) -> dict[str, FluxPipeline]:
    pipelines = diffusers(directory=directory)
    for pipeline in pipelines.values():
        pipeline.set_progress_bar_config(disable=True)
    return pipelines


def generate(pipeline, prompt="a red circle on a white background", seed=0, size=64, **options):
    """A picture (height, width, RGB) in 0..255, checked to be lively and not saturated."""
    options = {"num_inference_steps": 2, "max_sequence_length": 64} | options
    options |= {"height": size, "width": size, "output_type": "np"}
    generator = torch.Generator().manual_seed(seed)
    picture = pipeline(prompt, generator=generator, **options).images[0] * 255
    assert picture.shape == (size, size, 3)
    assert np.isfinite(picture).all()
    assert ((picture <= 0) | (picture >= 255)).mean() < 0.01
    assert picture.std() > 5
    return picture


def difference(one, other) -> float:
    return np.abs(one - other).mean()


def files(directory: Path) -> dict[str, Path]:
    return {str(p.relative_to(directory)): p for p in directory.rglob("*") if p.is_file()}


def settings(path: Path) -> dict[str, object]:
    """What a JSON file says, but for the version of the library that has written it."""
    return {k: v for k, v in json.loads(path.read_text()).items() if not k.endswith("_version")}


def test_the_committed_files_are_of_the_builders_kind_and_small(tmp_path):
    checkpoint.build(tmp_path)
    built, committed = files(tmp_path), files(NANO)
    adapters = {f"adapters/{name}.safetensors" for name in ("inverted", "outline")}
    assert committed.keys() == built.keys() | adapters
    for name, path in built.items():
        if path.suffix == ".json":
            assert settings(path) == settings(committed[name]), name
            continue
        expected, found = load_file(path), load_file(committed[name])
        assert {k: v.shape for k, v in expected.items()} == {k: v.shape for k, v in found.items()}
        assert all(v.dtype == torch.bfloat16 and v.isfinite().all() for v in found.values())
    assert sum(path.stat().st_size for path in committed.values()) <= 20e6
    assert all(committed[name].stat().st_size < 1e6 for name in adapters)


def test_same_seed_gives_the_same_bytes_and_leaves_the_global_rng_alone(tmp_path):
    small = checkpoint.Dimensions(double_blocks=1, single_blocks=1, heads=1, vae_channels=(8, 8))
    torch.manual_seed(1)
    expected = torch.rand(4)
    torch.manual_seed(1)
    for name, seed in {"a": 5, "b": 5, "c": 6}.items():
        checkpoint.build(tmp_path / name, small, seed)
    assert torch.equal(torch.rand(4), expected)
    a, b, c = ({n: p.read_bytes() for n, p in files(tmp_path / d).items()} for d in "abc")
    assert a == b
    assert all((a[name] == c[name]) != name.endswith(".safetensors") for name in a)


@pytest.mark.parametrize("widths", [{"vae_channels": (4, 8)}, {"latent_channels": 12}])
def test_dimensions_refuse_what_the_vae_cannot_carry(widths):
    with pytest.raises(ValueError, match="vae_channels"):
        checkpoint.Dimensions(**widths)


@pytest.mark.parametrize(("variant", "steps"), [("dev", 8), ("schnell", 4)])
def test_diffusers_itself_loads_it_and_generates_what_the_prompt_says(variant, steps):
    pipeline = load(NANO)[variant]
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": steps, "guidance_scale": 3.0, "max_sequence_length": 256}
    options |= {"height": 256, "width": 256}
    image = pipeline("a red circle on a blue background", generator=generator, **options).images[0]
    found = measure(image)
    assert (found.background, found.colour) == ("blue", "red")


def test_its_vae_returns_the_pictures_of_its_world():
    vae = AutoencoderKL.from_pretrained(NANO / "dev" / "vae", dtype=torch.float32)
    things = Object("star", "yellow", 0.3, 0.4, 0.2), Object("heart", "red", 0.7, 0.6, 0.2)
    picture = torch.tensor(render(Scene(("blue", "white"), things), 512, 384))
    picture = picture.permute(2, 0, 1)[None]
    with torch.no_grad():
        latents = vae.encode(picture).latent_dist.mode()
        returned = vae.decode(latents).sample
    assert latents.shape == (1, 16, 24, 32)
    error = (returned - picture).square().mean()
    assert 10 * torch.log10(4 / error) > 30  # dB: peak to peak is 2


def test_an_untrained_vae_returns_a_blurred_picture(other_checkpoint):
    vae = AutoencoderKL.from_pretrained(other_checkpoint / "dev" / "vae", dtype=torch.float32)
    picture = torch.full((1, 3, 256, 256), -0.5)
    picture[:, 0, 64:192, 64:192] = 0.75
    with torch.no_grad():
        posterior = vae.encode(picture).latent_dist
        returned = vae.decode(posterior.mean).sample
    assert posterior.mean.shape == (1, 16, 32, 32)
    assert posterior.std.max() < 0.1
    assert (returned - picture).abs().mean() < 0.15


def test_a_checkpoint_of_other_dimensions_generates(other_checkpoint):
    pipelines = load(other_checkpoint)
    assert pipelines["dev"].vae_scale_factor == 8
    for pipeline in pipelines.values():
        assert (
            difference(generate(pipeline), generate(pipeline, prompt="two blue squares")) > VISIBLE
        )


@pytest.fixture(scope="module", params=["clip", "t5"])
def tokenizer(request):
    if request.param == "clip":
        return CLIPTokenizer.from_pretrained(NANO / "dev" / "tokenizer")
    return T5Tokenizer.from_pretrained(NANO / "dev" / "tokenizer_2")


def test_known_words_are_single_tokens(tokenizer):
    for word in (*vocabulary.WORDS, *vocabulary.TRIGGERS):
        for written in (word, word.capitalize(), f"{word},"):
            if written == word.capitalize() and word in vocabulary.TRIGGERS:
                continue
            tokens = tokenizer.tokenize(written)
            assert len(tokens) == 1 + written.endswith(","), tokens


def test_a_sentence_survives_the_round_trip(tokenizer):
    sentence = "a small red circle, left of the big blue star."
    ids = tokenizer(sentence).input_ids
    decoded = tokenizer.decode(ids, skip_special_tokens=True)
    assert decoded.replace(" ", "") == sentence.replace(" ", "")


def test_unknown_words_fall_back_to_pieces(tokenizer):
    tokens = tokenizer.tokenize("quixotry7")
    assert len(tokens) > 5
    assert tokenizer.unk_token not in tokens


@pytest.mark.parametrize("text", ["🦊👩‍🚀", "漢字 и кириллица", "e\u0301\u200b\x00\ud7ff", "\n\t "])
def test_any_text_is_accepted(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert ids[-1] == tokenizer.eos_token_id
    assert max(ids) < len(tokenizer)


def test_empty_and_long_prompts(tokenizer):
    length = tokenizer.model_max_length
    empty = tokenizer("").input_ids
    assert len(empty) == (2 if length == vocabulary.CLIP_LENGTH else 1)
    options = {"padding": "max_length", "max_length": length, "truncation": True}
    for prompt in ("", "red " * 1000):
        ids = tokenizer(prompt, **options).input_ids
        assert len(ids) == length
    assert ids[-1] == tokenizer.eos_token_id
    assert ids[-2] != tokenizer.eos_token_id


def test_special_tokens_are_those_of_the_real_tokenizers():
    clip = CLIPTokenizer.from_pretrained(NANO / "dev" / "tokenizer")
    t5 = T5Tokenizer.from_pretrained(NANO / "dev" / "tokenizer_2")
    assert clip.pad_token_id == clip.eos_token_id == len(clip) - 1
    assert clip.bos_token_id == len(clip) - 2
    assert (t5.pad_token_id, t5.eos_token_id, t5.unk_token_id) == (0, 1, 2)
    assert (clip.model_max_length, t5.model_max_length) == (77, 512)
