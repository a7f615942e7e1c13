"""A checkpoint of FLUX.1's real dimensions with random weights, to measure where there is no other.

The speed of a step does not depend on the values of the weights. Classes, shapes, dtype (bf16) and
layout of the files are those of FLUX.1; the tokenizers are the miniature's, whose ids fit the real
vocabularies. schnell shares dev's weights: it has all of them but the guidance embedder, which its
configuration leaves unread.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import FluxPipeline

from miniature import checkpoint
from miniature.checkpoint import FLUX1, Dimensions, randomise
from miniature.vocabulary import clip_tokenizer, t5_tokenizer


def build(directory: Path, dimensions: Dimensions = FLUX1, device: str = "cpu") -> None:
    """Write `directory/dev` and `directory/schnell`, bf16 safetensors.

    Args:
        directory: FLUX.1's dimensions take 34 GB there.
        dimensions: of all models.
        device: where the weights are drawn; it takes 34 GB there too.
    """
    generator = torch.Generator(device).manual_seed(0)
    tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer()
    with _drawing_on(device):
        pipeline = FluxPipeline(
            scheduler=checkpoint.dev_sigmas(),
            vae=randomise(checkpoint.vae(dimensions), generator),
            text_encoder=randomise(checkpoint.clip(dimensions, tokenizer), generator),
            tokenizer=tokenizer,
            text_encoder_2=randomise(checkpoint.t5(dimensions, tokenizer_2), generator),
            tokenizer_2=tokenizer_2,
            transformer=randomise(checkpoint.transformer(dimensions, guidance=True), generator),
        )
    pipeline.save_pretrained(directory / "dev")
    schnell = directory / "schnell"
    pipeline.save_config(schnell)
    checkpoint.schnell_sigmas().save_pretrained(schnell / "scheduler")
    with torch.device("meta"):
        checkpoint.transformer(dimensions, guidance=False).save_config(schnell / "transformer")
    for file in (directory / "dev" / "transformer").glob("*.safetensors*"):
        link = schnell / "transformer" / file.name
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(file, link.parent))


@contextmanager
def _drawing_on(device: str) -> Iterator[None]:
    """Make modules there, in bf16."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)
