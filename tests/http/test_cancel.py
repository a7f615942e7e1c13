"""A cancel through the HTTP API, in every stage: it ends soon, and leaves nothing behind."""

import re
from typing import Any

import pytest
import requests
from PIL import Image

from tests.support.inputs import QUICK, SMALL
from tests.support.pictures import data_uri, encode, same

RAW = {"output_format": "png", **SMALL}
NOISE = data_uri(encode(Image.effect_noise((1024, 1024), 90), "JPEG"))  # takes long to encode
STAGES: dict[str, tuple[str, dict[str, Any]]] = {
    # stage: (the line of the log after which the cancel is sent, inputs that make it long)
    "text": ("Using seed", {"prompt": "red " * 2_000_000, "num_inference_steps": 50}),
    "denoising": (r"3/50 \[", {"num_inference_steps": 50}),
    "decoding": (r"1/1 \[", {"num_inference_steps": 1, "megapixels": "1"}),
    "encoding": (
        "Safety: image 4",  # so that only encoding is left
        {
            **{"image": NOISE, "prompt_strength": 0, "megapixels": "1"},
            **{"num_outputs": 4, "output_format": "png"},
        },
    ),
}


@pytest.fixture(scope="module")
def undisturbed(server) -> Image.Image:
    return server.generate(**RAW).image


@pytest.mark.parametrize("stage", STAGES)
def test_cancel(server, undisturbed, stage: str) -> None:
    line, inputs = STAGES[stage]
    final, _ = server.cancel(line, **inputs)
    assert final["status"] == "canceled", final
    assert not final.get("output")
    steps = [int(step) for step in re.findall(r"(\d+)/\d+ \[", final["logs"])]
    if stage == "text":
        assert max(steps, default=0) == 0
    if stage == "denoising":
        assert 3 <= max(steps) < 50
    if stage in ("text", "denoising", "decoding"):
        assert "Safety: image" not in final["logs"]
    leftovers = [path for path in server.outputs.rglob("*") if path.is_file()]
    assert leftovers == []
    assert same(server.generate(**RAW).image, undisturbed)


def test_a_client_that_hangs_up_cancels(server, undisturbed) -> None:
    start = len(server.lines)
    with pytest.raises(requests.ReadTimeout):
        server.server.request(
            "POST",
            "/predictions",
            json={"input": {**QUICK, "num_inference_steps": 50, "num_outputs": 4}},
            timeout=0.3,
        )
    assert same(server.generate(**RAW).image, undisturbed)
    assert len([line for line in server.lines[start:] if "Safety: image" in line]) < 5
