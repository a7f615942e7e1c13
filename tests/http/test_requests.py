"""What a caller observes, over HTTP from one running server."""

import re
import shutil
import threading
import time

import pytest
from PIL import Image

from serving.server import ServerError
from tests.support.inputs import PROMPT, SMALL
from tests.support.pictures import colours, data_uri, difference, same

SCHNELL = {"model": "schnell", "num_inference_steps": 1}
RAW = {"output_format": "png", **SMALL}


@pytest.mark.parametrize(
    ("inputs", "size"),
    [
        ({}, (512, 512)),
        ({"aspect_ratio": "21:9"}, (768, 320)),
        ({"aspect_ratio": "9:16"}, (384, 672)),
        ({"aspect_ratio": "16:9", "megapixels": None}, (1344, 768)),
        ({"aspect_ratio": "custom", "width": 300, "height": 264}, (304, 272)),
        ({"aspect_ratio": "custom", "width": 300.0, "height": 1440}, (304, 1440)),
        ({"width": 300, "height": 300}, (512, 512)),
    ],
)
def test_size(server, inputs, size) -> None:
    assert server.generate(**SCHNELL, **inputs).image.size == size


def test_custom_needs_width_and_height(server) -> None:
    error = server.fail(aspect_ratio="custom", width=512)
    assert "custom needs both width and height, got width=512, height=None" in error


@pytest.mark.parametrize(
    ("inputs", "line"),
    [
        ({"width": 300}, "width and height are ignored"),
        (SMALL, "megapixels is ignored"),
        (SCHNELL, "guidance_scale is ignored: schnell has no guidance embedding"),
    ],
)
def test_inputs_without_effect_are_named_in_the_log(server, inputs, line) -> None:
    assert line in server.generate(**inputs).logs


def seeds_logged(logs: str) -> list[int]:
    return [int(seed) for seed in re.findall(r"Using seed: (\d+)", logs)]


def test_a_seed_reproduces_its_picture_and_zero_is_a_seed(server) -> None:
    zero, again, one = (server.generate(seed=seed, **RAW) for seed in (0, 0.0, 1))
    assert same(zero.image, again.image)
    assert difference(zero.image, one.image) > 1
    assert seeds_logged(zero.logs + again.logs + one.logs) == [0, 0, 1]


@pytest.mark.parametrize("given", [None, -1])
def test_without_a_seed_the_log_tells_the_random_one(server, given) -> None:
    first, second = (server.generate(seed=given, **SCHNELL, **RAW) for _ in range(2))
    assert not same(first.image, second.image)
    (seed,) = seeds_logged(first.logs)
    assert 0 <= seed < 2**32
    assert same(server.generate(seed=seed, **SCHNELL, **RAW).image, first.image)


def test_huge_seeds_work(server) -> None:
    answer = server.generate(seed=2**70 + 2**60, **SCHNELL, **RAW)
    (seed,) = seeds_logged(answer.logs)
    assert same(server.generate(seed=seed, **SCHNELL, **RAW).image, answer.image)


@pytest.mark.parametrize("mode", ["txt2img", "img2img", "inpaint"])
def test_image_k_is_the_single_image_of_seed_plus_k(server, mode: str) -> None:
    inputs = {**SCHNELL, **RAW}
    if mode != "txt2img":
        inputs["image"] = data_uri(colours(96, 112))
    if mode == "inpaint":
        inputs["mask"] = data_uri(Image.linear_gradient("L"))
    batch = server.generate(seed=41, num_outputs=4.0, **inputs)
    assert len(batch.images) == 4
    for k, image in enumerate(batch.images):
        assert same(image, server.generate(seed=41 + k, **inputs).image)


def test_schnell_knows_no_guidance(server) -> None:
    low, high = (server.generate(guidance_scale=g, **SCHNELL, **RAW).image for g in (2, 5))
    assert same(low, high)


def test_the_log_has_a_progress_line_for_every_step(server) -> None:
    inputs = {"model": "schnell", "num_inference_steps": 4, **SMALL}
    logs = server.generate(num_outputs=2, **inputs).logs
    for step in range(1, 5):
        assert len(re.findall(rf"\b{step}/4 \[", logs)) >= 2


def test_the_prompt_may_be_empty(server) -> None:
    red, empty = (server.generate(prompt=prompt, **RAW).image for prompt in (PROMPT, ""))
    assert difference(red, empty) > 0.5


def test_dev_reads_512_tokens_and_schnell_256(server) -> None:
    start = "red " * 300
    for model, reads in (("dev", True), ("schnell", False)):
        inputs = {"model": model, **RAW}
        one, other = (server.generate(prompt=start + end, **inputs) for end in ("star", "heart"))
        assert same(one.image, other.image) is not reads
        assert ("T5 reads the first 256 tokens" in one.logs) is not reads
        assert (
            "CLIP reads the first 77 tokens of the prompt; T5 reads all of it" in one.logs
        ) is reads


SIGNATURES = {"webp": b"RIFF", "jpg": b"\xff\xd8\xff", "png": b"\x89PNG"}


@pytest.mark.parametrize("output_format", SIGNATURES)
def test_formats_quality_and_files(server, output_format: str) -> None:
    files = []
    for quality in (0, 50, 100):
        options = {"output_format": output_format, "output_quality": quality}
        answer = server.generate(**options, **SCHNELL, **SMALL)
        files.append(answer.files[0])
        assert answer.files[0].startswith(SIGNATURES[output_format])
        (path,) = [p for p in server.outputs.rglob("*") if p.is_file()]  # earlier ones are gone
        assert path.suffix == f".{output_format}"
        assert path.read_bytes() == answer.files[0]
    sizes = [len(content) for content in files]
    if output_format == "png":
        assert files[0] == files[1] == files[2]
    else:
        assert sizes[0] < sizes[1] < sizes[2]


def test_metrics(server) -> None:
    metrics = server.generate(num_outputs=2).metrics
    assert metrics["image_output_count"] == 2
    assert metrics["megapixels"] == 0.25
    assert metrics["compiled"] == 0  # on a CPU
    stages = ("text", "adapters", "denoising", "decoding", "safety", "encoding")
    timing = metrics["timing"]
    assert all(0 <= timing[stage] <= metrics["predict_time"] for stage in stages)
    assert timing["denoising"] > 0
    assert sum(timing.values()) - timing["encoding"] < metrics["predict_time"]
    still = server.generate(image=data_uri(colours(64, 64)), prompt_strength=0).metrics["timing"]
    assert still["input"] > 0
    assert still["denoising"] == 0


@pytest.mark.parametrize(
    ("inputs", "named"),
    [
        ({"prompt": None}, "prompt"),
        ({"num_outputs": 5}, "num_outputs"),
        ({"width": 128}, "width"),
        ({"prompt_strength": 1.1}, "prompt_strength"),
        ({"num_inference_steps": 2.5}, "num_inference_steps"),
        ({"aspect_ratio": "2:1"}, "aspect_ratio"),
        ({"output_quality": 101}, "output_quality"),
    ],
)
def test_the_schema_is_enforced(server, inputs, named: str) -> None:
    with pytest.raises(ServerError, match=f"HTTP 422.*{named}"):
        server.predict(**inputs)


def test_an_output_directory_that_vanishes_is_made_anew(server) -> None:
    server.generate()
    for directory in server.outputs.iterdir():
        shutil.rmtree(directory)
    assert server.generate().image.size == (512, 512)


def test_the_server_is_healthy_while_it_generates(server) -> None:
    def look() -> None:
        seen.append(server.server.request("GET", "/health-check").json())

    seen: list[dict[str, object]] = []
    generation = threading.Thread(
        target=server.generate, kwargs={"num_inference_steps": 10, **SMALL}
    )
    generation.start()
    while generation.is_alive():
        look()
    generation.join()
    assert "BUSY" in {health["status"] for health in seen}
    assert {health["status"] for health in seen} <= {"BUSY", "READY"}
    assert not any("user_healthcheck_error" in health for health in seen)


def test_the_server_survives_all_of_the_above(server) -> None:
    assert server.generate().image.size == (512, 512)
    for _ in range(50):  # BUSY for a moment after an answer, like the 409 between predictions
        health = server.server.request("GET", "/health-check").json()["status"]
        if health != "BUSY":
            break
        time.sleep(0.1)
    assert health == "READY"
