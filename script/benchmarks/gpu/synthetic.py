"""A checkpoint of FLUX.1's real dimensions with random weights, to measure where there is no other.

The speed of a step does not depend on the values of the weights. Classes, shapes, dtype (bf16) and
layout of the files are those of FLUX.1, but for more and smaller files of the transformer, which
are written side by side. The tokenizers are the miniature's, whose ids fit the real vocabularies.
schnell shares dev's weights: it has all of them but the guidance embedder, which its configuration
leaves unread.
"""

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from miniature import checkpoint
from miniature.checkpoint import FLUX1, Dimensions, randomise
from miniature.vocabulary import clip_tokenizer, t5_tokenizer

NAME = "diffusion_pytorch_model{suffix}.safetensors"  # diffusers' own
FILE_BYTES = 2_000_000_000
WRITERS = 8  # each copies a file's weights to the host, where the device is another


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
    transformer = pipeline.transformer
    with ThreadPoolExecutor(WRITERS) as pool:
        written = _write(transformer, directory / "dev" / "transformer", pool)
        pipeline.register_modules(transformer=None)
        pipeline.save_pretrained(directory / "dev")
        list(written)  # raises what a writer raised
    pipeline.register_modules(transformer=transformer)
    pipeline.save_config(directory / "dev")
    schnell = directory / "schnell"
    pipeline.save_config(schnell)
    checkpoint.schnell_sigmas().save_pretrained(schnell / "scheduler")
    with torch.device("meta"):
        checkpoint.transformer(dimensions, guidance=False).save_config(schnell / "transformer")
    for file in (directory / "dev" / "transformer").glob("*.safetensors*"):
        link = schnell / "transformer" / file.name
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(file, link.parent))


def _write(
    model: FluxTransformer2DModel, directory: Path, pool: ThreadPoolExecutor
) -> Iterator[None]:
    """Begin to write a transformer as `save_pretrained` does; the iterator waits for the files."""
    model.save_config(directory)
    weights = model.state_dict()
    plan = split_torch_state_dict_into_shards(
        weights, filename_pattern=NAME, max_shard_size=FILE_BYTES
    )
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        file = directory / f"{NAME.format(suffix='')}.index.json"
        file.write_text(json.dumps(index))
    files = {
        directory / name: {key: weights[key] for key in keys}
        for name, keys in plan.filename_to_tensors.items()
    }
    return pool.map(partial(save_file, metadata={"format": "pt"}), files.values(), files)


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
