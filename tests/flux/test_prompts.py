"""Prompts: encoded as diffusers encodes them, kept, and cut with a word about it."""

import pytest
import torch

from flux.prompts import MAX_CHARACTERS, PromptEncoder
from tests.support.embedded import diffusers

PROMPT = "a red circle on a blue background"


@pytest.fixture(scope="module")
def pipeline():
    return diffusers()["dev"]


@pytest.fixture
def encoder(pipeline) -> PromptEncoder:
    torch.set_grad_enabled(False)
    yield PromptEncoder(pipeline)
    torch.set_grad_enabled(True)


@pytest.mark.parametrize("prompt", [PROMPT, ""])
@pytest.mark.parametrize("length", [256, 512])
def test_embeddings_are_those_of_diffusers(encoder, pipeline, prompt: str, length: int) -> None:
    found = encoder.encode(prompt, length, ())
    embeds, pooled, _ = pipeline.encode_prompt(prompt, prompt, max_sequence_length=length)
    assert torch.equal(found.prompt_embeds, embeds)
    assert torch.equal(found.pooled_prompt_embeds, pooled)
    assert found.prompt_embeds.shape[:2] == (1, length)


def test_encoders_that_hold_another_adapter_encode_anew(encoder, pipeline) -> None:
    before = encoder.encode(PROMPT, 256, ())
    weight = pipeline.text_encoder.get_parameter("final_layer_norm.weight")
    kept = weight.clone()
    try:
        weight.mul_(2)
        assert torch.equal(
            encoder.encode(PROMPT, 256, ()).pooled_prompt_embeds, before.pooled_prompt_embeds
        )
        changed = encoder.encode(PROMPT, 256, ("adapter", 1.0))
        assert not torch.equal(changed.pooled_prompt_embeds, before.pooled_prompt_embeds)
    finally:
        weight.copy_(kept)
    restored = encoder.encode(PROMPT, 256, ())
    assert torch.equal(restored.pooled_prompt_embeds, before.pooled_prompt_embeds)


@pytest.mark.parametrize(
    ("words", "length", "lines"),
    [
        (10, 256, []),
        (100, 256, ["CLIP reads the first 77 tokens of the prompt; T5 reads all of it"]),
        (
            300,
            256,
            [
                "The prompt is cut: T5 reads the first 256 tokens of it",
                "CLIP reads the first 77 tokens of the prompt",
            ],
        ),
        (300, 512, ["CLIP reads the first 77 tokens of the prompt; T5 reads all of it"]),
    ],
)
def test_what_is_not_read_is_logged_each_time(encoder, caplog, words, length, lines) -> None:
    caplog.set_level("INFO")
    for _ in range(2):
        caplog.clear()
        encoder.encode("red " * words, length, ())
        said = [r.getMessage() for r in caplog.records if r.name == "flux.prompts"]
        assert said == lines


def test_a_prompt_of_megabytes_is_its_beginning(encoder) -> None:
    long = encoder.encode("red " * 1_000_000, 256, ())
    assert encoder.encode(("red " * 1_000_000)[:MAX_CHARACTERS], 256, ()) is long
