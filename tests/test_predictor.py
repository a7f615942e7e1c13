"""The predictor itself, in this process: other deployments than the served default."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import FluxImg2ImgPipeline, FluxPipeline, FluxTransformer2DModel
from PIL import Image
from transformers import T5EncoderModel

from flux.load import NANO, SHARED
from flux.memory import bytes_of
from safety.checker import Verdict
from tests.planted import plant_flags
from tests.support import (
    QUICK,
    Draw,
    colours,
    difference,
    pixels,
    same,
    set_up_predictor,
)


@pytest.fixture
def start(monkeypatch, tmp_path) -> Callable[..., Draw]:
    """Set up a predictor under the given environment; returns its `run`, giving images."""
    return partial(set_up_predictor, monkeypatch, tmp_path / "outputs")


def diffusers(dtype: torch.dtype = torch.float32) -> dict[str, FluxPipeline]:
    """diffusers' own pipelines on the embedded checkpoint, as it loads them itself."""
    dev = FluxPipeline.from_pretrained(NANO / "dev", dtype=dtype)
    shared = {name: dev.components[name] for name in SHARED}
    schnell = FluxPipeline.from_pretrained(NANO / "schnell", dtype=dtype, **shared)
    return {"dev": dev, "schnell": schnell}


def largest_difference(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(pixels(a) - pixels(b)).max())


# --- diffusers as the oracle


@pytest.mark.parametrize(("model", "steps"), [("dev", 5), ("schnell", 4)])
def test_text_to_image_is_diffusers_own(start, model: str, steps: int) -> None:
    (ours,) = start()(model=model, num_inference_steps=steps, guidance_scale=2.5, seed=3)
    theirs = diffusers()[model](
        QUICK["prompt"],
        width=512,
        height=512,
        num_inference_steps=steps,
        guidance_scale=2.5,
        max_sequence_length={"dev": 512, "schnell": 256}[model],
        generator=torch.Generator().manual_seed(3),
    ).images[0]
    assert largest_difference(ours, theirs) <= 1  # our VAE's convolutions run in another order


def test_image_to_image_is_diffusers_own_where_its_whole_steps_meet_ours(start, tmp_path) -> None:
    """With ten steps at 0.5, diffusers starts at the sixth of its sigmas, which is 0.5."""
    picture, path = colours(128, 96), tmp_path / "picture.png"
    picture.save(path)
    (ours,) = start()(image=path, num_inference_steps=10, prompt_strength=0.5)
    pipeline = FluxImg2ImgPipeline(**diffusers()["dev"].components)
    vae = pipeline.vae
    with torch.no_grad():
        mean = vae.encode(pipeline.image_processor.preprocess(picture)).latent_dist.mode()
    theirs = pipeline(
        QUICK["prompt"],
        image=(mean - vae.config.shift_factor) * vae.config.scaling_factor,
        width=128,
        height=96,
        num_inference_steps=10,
        strength=0.5,
        guidance_scale=3,
        generator=torch.Generator().manual_seed(QUICK["seed"]),
    ).images[0]
    assert difference(ours, theirs) < 0.1  # the sigmas differ in the last bit


# --- other checkpoints and dtypes


def test_a_checkpoint_of_other_dimensions(start, other_checkpoint, tmp_path) -> None:
    draw = start(FLUX_CHECKPOINT=str(other_checkpoint))
    path, mask = tmp_path / "picture.png", tmp_path / "mask.png"
    colours(80, 112).save(path)
    Image.linear_gradient("L").save(mask)
    assert draw()[0].size == (512, 512)
    assert draw(aspect_ratio="custom", width=272, height=304)[0].size == (272, 304)
    assert draw(image=path)[0].size == (80, 112)
    assert draw(image=path, mask=mask, model="schnell")[0].size == (80, 112)


def test_a_directory_without_pipelines_fails_setup_and_says_what_is_expected(
    start, tmp_path
) -> None:
    with pytest.raises(RuntimeError, match=r"holds no pipeline .* expected official, nano, or a"):
        start(FLUX_CHECKPOINT=str(tmp_path))


def test_true_bfloat16(start) -> None:
    (ours,) = start(FLUX_DTYPE="bfloat16")()
    theirs = diffusers(torch.bfloat16)["dev"](
        QUICK["prompt"],
        width=512,
        height=512,
        num_inference_steps=QUICK["num_inference_steps"],
        guidance_scale=3,
        generator=torch.Generator().manual_seed(QUICK["seed"]),
    ).images[0]
    assert difference(ours, theirs) < 0.5
    (full,) = start()()
    assert not same(ours, full)


def test_auto_in_a_path_is_a_part_of_the_path(start, tmp_path) -> None:
    path = tmp_path / "automatic"
    with pytest.raises(RuntimeError, match=f"FLUX_CHECKPOINT={path}: {path}/dev holds no pipeline"):
        start(FLUX_CHECKPOINT=str(path))


@pytest.mark.parametrize("device", ["banana", "cuda:7"])
def test_an_unknown_device_fails_setup_and_names_the_setting(start, device: str) -> None:
    if device.startswith("cuda") and torch.cuda.device_count() > 7:
        pytest.skip("this machine has that device")
    with pytest.raises(ValueError, match=f"FLUX_DEVICE={device}: no such device here"):
        start(FLUX_DEVICE=device)


# --- memory


def gigabytes(name: str) -> float:
    """What FLUX_DEVICE_MEMORY_GB must be for dev or schnell to fit in bf16, and no more."""
    pipeline = diffusers()[name]
    shared = (pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2)
    return sum(bytes_of(module) for module in (*shared, pipeline.transformer)) / 2**30 + 1e-6


def test_a_device_with_room_for_one_serves_all_to_the_bit(start, caplog) -> None:
    roomy, quick = start(), {"num_inference_steps": 1}
    narrow = start(FLUX_DEVICE_MEMORY_GB=str(gigabytes("dev")))
    for model, go_fast in [("schnell", False), ("dev", True), ("dev", False), ("schnell", True)]:
        request = {"model": model, "go_fast": go_fast, **quick}
        assert same(narrow(**request)[0], roomy(**request)[0])
    assert "dev bf16 leaves cpu" in caplog.text


def test_a_device_too_small_for_one_says_so(start) -> None:
    room = str(gigabytes("dev") - 0.0005)
    draw = start(FLUX_DEVICE_MEMORY_GB=room)
    with pytest.raises(RuntimeError, match=r"dev bf16 takes .* use the other precision"):
        draw()
    assert draw(go_fast=True)
    with pytest.raises(RuntimeError, match="raise FLUX_DEVICE_MEMORY_GB"):
        start(FLUX_DEVICE_MEMORY_GB="0.0001")


@pytest.mark.parametrize("times", [1, 2])
def test_out_of_memory_in_a_step(start, monkeypatch, caplog, times) -> None:
    draw = start()
    expected, fast = draw()[0], draw(go_fast=True)[0]
    forward, remaining = FluxTransformer2DModel.forward, iter(range(times))

    def runs_out(*args: object, **options: object) -> object:
        if next(remaining, None) is not None:
            raise torch.OutOfMemoryError("CUDA out of memory (pretended)")
        return forward(*args, **options)

    monkeypatch.setattr(FluxTransformer2DModel, "forward", runs_out)
    if times == 1:
        assert same(draw()[0], expected)
    else:
        with pytest.raises(RuntimeError, match=r"Out of memory on cpu, also with dev bf16 alone"):
            draw()
        assert same(draw()[0], expected)
    assert "dev fp8 leaves cpu" in caplog.text
    assert same(draw(go_fast=True)[0], fast)


def test_out_of_memory_in_the_text_encoders(start, monkeypatch, caplog) -> None:
    expected = start()(prompt="a heart")[0]
    forward, remaining = T5EncoderModel.forward, iter(range(1))

    def runs_out(*args: object, **options: object) -> object:
        if next(remaining, None) is not None:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED (pretended)")
        return forward(*args, **options)

    monkeypatch.setattr(T5EncoderModel, "forward", runs_out)
    assert same(start()(prompt="a heart")[0], expected)
    assert "trying again with less there" in caplog.text


def test_float8_activations(start) -> None:
    """The form that cards use, computed on a CPU: a little further from bf16."""
    (exact,), (weights,) = (start()(go_fast=go_fast) for go_fast in (False, True))
    (dynamic,) = start(FLUX_FP8_ACTIVATIONS="fp8")(go_fast=True)
    assert 0 < difference(dynamic, exact) < 4
    assert not same(dynamic, weights)


# --- safety


def scores(caplog) -> list[float]:
    found = [r.message for r in caplog.records if r.message.startswith("Safety: image")]
    return [float(message.split("open_nsfw ")[1].rstrip(")")) for message in found]


def test_withheld_images_are_left_out_and_named_in_the_log(start, caplog) -> None:
    everything = start(FLUX_NSFW_THRESHOLD="1")(num_outputs=4)
    limit = sorted(scores(caplog))[2] - 0.0005  # the log rounds to three places
    caplog.clear()
    delivered = start(FLUX_NSFW_THRESHOLD=str(limit))(num_outputs=4)
    expected = [
        image for image, score in zip(everything, scores(caplog), strict=True) if score < limit
    ]
    assert 0 < len(delivered) < 4
    assert len(delivered) == len(expected)
    assert all(same(a, b) for a, b in zip(delivered, expected, strict=True))
    withheld = [r.message for r in caplog.records if "WITHHELD" in r.message]
    assert len(withheld) == 4 - len(delivered)


def test_all_withheld_is_an_error_and_leaves_no_files(start, tmp_path) -> None:
    draw = start(FLUX_NSFW_THRESHOLD="0")
    with pytest.raises(ValueError, match="withheld every image; try another prompt"):
        draw(num_outputs=2)
    assert [p for p in (tmp_path / "outputs").rglob("*") if p.is_file()] == []
    assert draw(disable_safety_checker=True)


def test_the_operator_may_forbid_to_disable_the_checker(start, caplog) -> None:
    draw = start(FLUX_NSFW_THRESHOLD="0", FLUX_ALLOW_DISABLE_SAFETY_CHECKER="false")
    with pytest.raises(ValueError, match="withheld every image"):
        draw(disable_safety_checker=True)
    assert "disable_safety_checker is ignored: this deployment does not allow it" in caplog.text


def test_the_official_pair_decides_what_is_delivered(
    start, official_files, tmp_path, caplog
) -> None:
    everything = start()(num_outputs=4)
    for variant in ("dev", "schnell"):
        (tmp_path / "brought").mkdir(exist_ok=True)
        (tmp_path / "brought" / variant).symlink_to(NANO / variant)
    plant_flags(tmp_path / "brought", official_files, everything, {0, 2}, {1, 2})
    caplog.clear()
    delivered = start(FLUX_CHECKPOINT=str(tmp_path / "brought"))(num_outputs=4)
    assert len(delivered) == 3
    expected = [everything[0], everything[1], everything[3]]
    assert all(same(a, b) for a, b in zip(delivered, expected, strict=True))
    (withheld,) = [r.message for r in caplog.records if "WITHHELD" in r.message]
    assert withheld.startswith("Safety: image 3 of 4 is WITHHELD (compvis ")
    draw = start(FLUX_CHECKPOINT=str(tmp_path / "brought"), FLUX_SAFETY_POLICY="falconsai")
    with pytest.raises(ValueError, match="withheld every image; try another prompt"):
        draw(num_outputs=2, seed=QUICK["seed"] + 1)
    assert [p for p in (tmp_path / "outputs").rglob("*") if p.is_file()] == []


class Broken:
    def check(self, image: Image.Image) -> Verdict:
        raise RuntimeError("out of memory")


class Nonsense:
    def check(self, image: Image.Image) -> Verdict:
        return Verdict(flagged=False, scores={"open_nsfw": float("nan")})


@pytest.mark.parametrize("checker", [Broken, Nonsense])
def test_a_checker_that_fails_passes_nothing(start, monkeypatch, checker) -> None:
    monkeypatch.setattr("predict.load_checker", lambda *_: checker())
    draw = start()
    with pytest.raises(ValueError, match="The safety checker failed, so no image is delivered"):
        draw()


# --- failures


def test_a_failed_encoding_fails_the_request_and_leaves_no_files(
    start, monkeypatch, tmp_path
) -> None:
    draw = start()

    def full_disk(*_: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("flux.outputs.save", full_disk)
        with pytest.raises(OSError, match="no space left"):
            draw(num_outputs=2)
    assert [p for p in (tmp_path / "outputs").rglob("*") if p.is_file()] == []
    assert draw()


def test_a_real_photograph_is_safe_in_the_eyes_of_the_real_model(photograph) -> None:
    from safety.open_nsfw import OpenNSFW

    verdict = OpenNSFW(threshold=0.8).check(photograph)
    assert not verdict.flagged
    assert verdict.scores["open_nsfw"] < 0.1


@pytest.mark.gpu
def test_both_variants_on_a_gpu(start) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    draw = start(FLUX_DEVICE="cuda")
    cpu = start()
    for model in ("dev", "schnell"):
        assert difference(draw(model=model)[0], cpu(model=model)[0]) < 8
        assert same(draw(model=model)[0], draw(model=model)[0])
        fast = draw(model=model, go_fast=True)[0]
        assert difference(fast, cpu(model=model, go_fast=True)[0]) < 8
