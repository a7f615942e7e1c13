"""The predictor itself, in this process: other deployments than the served default."""

import errno
import re

import pytest
import torch
from diffusers import FluxImg2ImgPipeline
from PIL import Image
from safetensors.torch import save
from torch._subclasses import FakeTensorMode

from flux.deployment import NANO, Deployment
from predict import Predictor
from safety.checker import Verdict
from tests.support.adapters import adapter
from tests.support.embedded import diffusers
from tests.support.inputs import QUICK, SMALL
from tests.support.pictures import colours, data_uri, difference, largest_difference, same
from tests.support.planted import plant_flags
from weights.serving.errors import DirectoryError, DiskSpaceError
from weights.serving.settings import Settings

# --- diffusers as the oracle


@pytest.mark.parametrize(
    ("model", "steps", "guidance"), [("dev", 5, 2.5), ("schnell", 4, 2.5), ("dev", 2, 0)]
)
def test_text_to_image_is_diffusers_own(usual, model: str, steps: int, guidance: float) -> None:
    inputs = {"model": model, "num_inference_steps": steps, "guidance_scale": guidance, "seed": 3}
    (ours,) = usual(**inputs, megapixels="0.25")
    theirs = diffusers()[model](
        QUICK["prompt"],
        width=512,
        height=512,
        num_inference_steps=steps,
        guidance_scale=guidance,
        max_sequence_length={"dev": 512, "schnell": 256}[model],
        generator=torch.Generator().manual_seed(3),
    ).images[0]
    assert largest_difference(ours, theirs) <= 1  # our VAE's convolutions run in another order


def test_image_to_image_is_diffusers_own_where_its_whole_steps_meet_ours(usual, tmp_path) -> None:
    """With ten steps at 0.5, diffusers starts at the sixth of its sigmas, which is 0.5."""
    picture, path = colours(128, 96), tmp_path / "picture.png"
    picture.save(path)
    (ours,) = usual(image=path, num_inference_steps=10, prompt_strength=0.5)
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
    generate = start(FLUX_CHECKPOINT=str(other_checkpoint))
    path, mask = tmp_path / "picture.png", tmp_path / "mask.png"
    colours(80, 112).save(path)
    Image.linear_gradient("L").save(mask)
    assert generate(megapixels="0.25")[0].size == (512, 512)
    assert generate(aspect_ratio="custom", width=272, height=304)[0].size == (272, 304)
    assert generate(image=path)[0].size == (80, 112)
    assert generate(image=path, mask=mask, model="schnell")[0].size == (80, 112)


def test_a_directory_without_pipelines_fails_setup_and_says_what_is_expected(
    start, tmp_path
) -> None:
    with pytest.raises(RuntimeError, match=r"holds no pipeline .* expected official, nano, or a"):
        start(FLUX_CHECKPOINT=str(tmp_path))


def test_true_bfloat16(start, usual) -> None:
    (ours,) = start(FLUX_DTYPE="bfloat16")(**SMALL)
    theirs = diffusers(torch.bfloat16)["dev"](
        QUICK["prompt"],
        width=SMALL["width"],
        height=SMALL["height"],
        num_inference_steps=QUICK["num_inference_steps"],
        guidance_scale=3,
        generator=torch.Generator().manual_seed(QUICK["seed"]),
    ).images[0]
    assert difference(ours, theirs) < 0.5
    (full,) = usual(**SMALL)
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


def test_a_card_by_its_number_is_the_one_that_kernels_are_launched_on(monkeypatch) -> None:
    """Triton launches on the thread's current device, whichever card the tensors are on."""
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    with FakeTensorMode():  # which has every card
        deployment = Deployment.choose(Settings(device="cuda:1", checkpoint="nano"))
    assert current == [deployment.device] == [torch.device("cuda", 1)]


def test_float8_activations(start, usual) -> None:
    """The form that cards use, computed on a CPU: a little further from bf16."""
    size = {"megapixels": "0.25"}
    (exact,), (weights,) = (usual(go_fast=fast, **size) for fast in (False, True))
    (dynamic,) = start(FLUX_FP8_ACTIVATIONS="fp8")(go_fast=True, **size)
    assert 0 < difference(dynamic, exact) < 4
    assert not same(dynamic, weights)


# --- safety


def scores(caplog) -> list[float]:
    found = [r.message for r in caplog.records if r.message.startswith("Safety: image")]
    return [float(message.split("open_nsfw ")[1].rstrip(")")) for message in found]


def test_withheld_images_are_left_out_and_named_in_the_log(start, caplog) -> None:
    varied = {"prompt": "", "num_outputs": 4, **SMALL}
    everything = start(FLUX_NSFW_THRESHOLD="1")(**varied)
    limit = sorted(scores(caplog))[2] - 0.0005  # the log rounds to three places
    caplog.clear()
    delivered = start(FLUX_NSFW_THRESHOLD=str(limit))(**varied)
    expected = [
        image for image, score in zip(everything, scores(caplog), strict=True) if score < limit
    ]
    assert 0 < len(delivered) < 4
    assert len(delivered) == len(expected)
    assert all(same(a, b) for a, b in zip(delivered, expected, strict=True))
    withheld = [r.message for r in caplog.records if "WITHHELD" in r.message]
    assert len(withheld) == 4 - len(delivered)


def test_all_withheld_is_an_error_and_leaves_no_files(start, tmp_path) -> None:
    generate = start(FLUX_NSFW_THRESHOLD="0")
    with pytest.raises(ValueError, match="withheld every image; try another prompt"):
        generate(num_outputs=2, **SMALL)
    assert [p for p in (tmp_path / "outputs").rglob("*") if p.is_file()] == []
    assert generate(disable_safety_checker=True)


def test_the_operator_may_forbid_to_disable_the_checker(start, caplog) -> None:
    generate = start(FLUX_NSFW_THRESHOLD="0", FLUX_ALLOW_DISABLE_SAFETY_CHECKER="false")
    with pytest.raises(ValueError, match="withheld every image"):
        generate(disable_safety_checker=True)
    assert "disable_safety_checker is ignored: this deployment does not allow it" in caplog.text


def test_the_official_pair_decides_what_is_delivered(
    start, usual, official_files, tmp_path, caplog
) -> None:
    everything = usual(num_outputs=4, **SMALL)
    for variant in ("dev", "schnell"):
        (tmp_path / "brought").mkdir(exist_ok=True)
        (tmp_path / "brought" / variant).symlink_to(NANO / variant)
    plant_flags(tmp_path / "brought", official_files, everything, {0, 2}, {1, 2})
    caplog.clear()
    delivered = start(FLUX_CHECKPOINT=str(tmp_path / "brought"))(num_outputs=4, **SMALL)
    assert len(delivered) == 3
    expected = [everything[0], everything[1], everything[3]]
    assert all(same(a, b) for a, b in zip(delivered, expected, strict=True))
    (withheld,) = [r.message for r in caplog.records if "WITHHELD" in r.message]
    assert withheld.startswith("Safety: image 3 of 4 is WITHHELD (compvis ")
    generate = start(FLUX_CHECKPOINT=str(tmp_path / "brought"), FLUX_SAFETY_POLICY="falconsai")
    with pytest.raises(ValueError, match="withheld every image; try another prompt"):
        generate(num_outputs=2, seed=QUICK["seed"] + 1, **SMALL)
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
    generate = start()
    with pytest.raises(ValueError, match="The safety checker failed, so no image is delivered"):
        generate()


# --- failures


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (OSError("broken"), OSError, "broken"),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            DiskSpaceError,
            "The disk of the output directory .*/outputs is full: free some space, or set "
            "FLUX_OUTPUT_DIRECTORY to a directory on another disk$",
        ),
    ],
    ids=["broken", "full"],
)
def test_a_failed_encoding_fails_the_request_and_leaves_no_files(
    start, monkeypatch, tmp_path, error, expected, message
) -> None:
    generate = start()

    def fail(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("weights.serving.outputs.save", fail)
        with pytest.raises(expected, match=message):
            generate(num_outputs=2, **SMALL)
    assert [p for p in (tmp_path / "outputs").rglob("*") if p.is_file()] == []
    assert generate()


def test_a_real_photograph_is_safe_in_the_eyes_of_the_real_model(photograph) -> None:
    from safety.open_nsfw import OpenNSFW

    verdict = OpenNSFW(threshold=0.8).check(photograph)
    assert not verdict.flagged
    assert verdict.scores["open_nsfw"] < 0.1


def test_an_adapter_cache_that_cannot_be_written_fails_requests_with_adapters_only(
    start, caplog
) -> None:
    """As in a container with a read-only root, or with a user that has no home."""
    generate = start(FLUX_CACHE_DIRECTORY="/dev/null")
    message = "/dev/null/adapters: this directory cannot be written .* set FLUX_CACHE_DIRECTORY"
    assert re.search(message, caplog.text)
    assert generate()
    with pytest.raises(DirectoryError, match=message):
        generate(replicate_weights=data_uri(save(adapter(1))))


def test_an_output_directory_that_cannot_be_written_fails_setup(start) -> None:
    with pytest.raises(DirectoryError, match=r"/dev/null/outputs: this .* FLUX_OUTPUT_DIRECTORY"):
        start(FLUX_OUTPUT_DIRECTORY="/dev/null/outputs")


def test_fp32_is_computed_in_fp32_whatever_was_allowed(start) -> None:
    """By TORCH_ALLOW_TF32_CUBLAS_OVERRIDE for one, which counts when torch is imported."""
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = True
        start()
        assert not any(backend.allow_tf32 for backend in backends)
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed


def test_the_healthcheck(start, monkeypatch) -> None:
    start()
    predictor = Predictor()
    predictor.setup()
    assert predictor.healthcheck()
    with monkeypatch.context() as patch:
        patch.setattr("weights.serving.worker.EngineThread.is_alive", False)
        assert not predictor.healthcheck()
    monkeypatch.setattr("flux.memory.device.answers", lambda device: False)
    assert not predictor.healthcheck()
