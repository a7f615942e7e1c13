"""Train the miniature from nothing, or from where it stopped: script/miniature/train.

Everything is made on the fly from a fixed seed; nothing is downloaded. Each stage keeps its state
and its losses in the work directory, and is taken up again where it was interrupted:

    vae, text   the VAE; the text encoders
    pool        latents of scenes (may run beside dev, which uses what is there)
    dev         the transformer; then `schnell`, which begins as dev
    adapters    two LoRAs of dev
    export      writes the checkpoint
"""

import argparse
import copy
import logging
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from miniature import checkpoint
from miniature.training import adapters, autoencoder, flow, pool, text
from miniature.training.stage import weights
from miniature.vocabulary import clip_tokenizer, t5_tokenizer

logger = logging.getLogger(__name__)

STAGES = ("vae", "text", "pool", "dev", "schnell", "adapters", "export")
SHARDS: tuple[tuple[pool.Size, int], ...] = (
    ((256, 256), 24), ((352, 192), 6), ((192, 352), 6), ((384, 384), 6), ((512, 512), 8),
    ((672, 384), 4), ((384, 672), 4), ((256, 256), 44), ((512, 512), 24), ((672, 384), 10),
    ((384, 672), 10), ((1024, 1024), 4), ((512, 512), 36), ((672, 384), 14), ((384, 672), 14),
    ((1024, 1024), 10),
)  # fmt: skip


class Recipe:
    """The stages over one work directory; modules are built from the builder's seed."""

    def __init__(self, work: Path, seed: int = 0, *, compiled: bool = False) -> None:
        self._work, self._compiled = work, compiled
        self._models = checkpoint.models(checkpoint.Dimensions(), seed)
        for model in self._models.modules():
            model.float()

    def vae(self) -> None:
        """The VAE, on pictures of every kind."""
        autoencoder.train(self._models.vae, self._work)

    def text(self) -> None:
        """Both text encoders, on captions alone."""
        models = self._models
        text.train(models.clip, models.clip_tokenizer, models.t5, models.t5_tokenizer, self._work)

    def pool(self) -> None:
        """The latents that the transformers learn from."""
        vae = self._done(self._models.vae, "vae-2", "vae")
        for size, shards in SHARDS:
            for shard in range(shards):
                pool.make(vae, self._work / "pool", size, shard)
            logger.info("pool %d x %d: %d shards", *size, shards)

    def dev(self) -> None:
        """The transformer with guidance."""
        latents = pool.Pool(self._work / "pool")
        dev = self._models.dev
        if self._compiled:
            dev.compile(dynamic=False)
        flow.train(dev, self._text_encoders(), latents, self._work)

    def schnell(self) -> None:
        """The transformer without."""
        dev = self._dev()
        flow.fold_guidance(dev, self._models.schnell)
        latents = pool.Pool(self._work / "pool")
        flow.train_schnell(self._models.schnell, self._text_encoders(), latents, self._work)

    def adapters(self) -> None:
        """A LoRA for each style, one in each of the two formats that are met most."""
        vae = self._done(self._models.vae, "vae-2", "vae")
        encoders = self._text_encoders()
        save = {"inverted": adapters.save_as_trainer, "outline": adapters.save_as_kohya}
        for style in adapters.STYLES:
            factors = adapters.train(style, copy.deepcopy(self._dev()), encoders, vae, self._work)
            save[style](factors, self._work / f"{style}.safetensors")

    def export(self, directory: Path) -> None:
        """Write the checkpoint and the adapters."""
        self._done(self._models.vae, "vae-2", "vae")
        self._text_encoders()
        self._dev()
        self._done(self._models.schnell, "schnell", "transformer")
        unused = {"clip_tokenizer": clip_tokenizer(), "t5_tokenizer": t5_tokenizer()}
        # a tokenizer that was used would be saved with its padding
        checkpoint.save(replace(self._models, **unused), directory)
        (directory / "adapters").mkdir(exist_ok=True)
        for style in adapters.STYLES:
            path = self._work / f"{style}.safetensors"
            (directory / "adapters" / path.name).write_bytes(path.read_bytes())

    def _text_encoders(self) -> flow.TextEncoders:
        models = self._models
        clip = self._done(models.clip, "text", "clip")
        t5 = self._done(models.t5, "text", "t5")
        return flow.TextEncoders(clip, models.clip_tokenizer, t5, models.t5_tokenizer)

    def _dev(self) -> nn.Module:
        """The trained transformer with guidance."""
        return self._done(self._models.dev, "dev-2", "transformer")

    def _done(self, module: nn.Module, stage: str, name: str) -> nn.Module:
        """A module with what a stage has learned so far, as it will be saved: rounded to bf16."""
        module.load_state_dict(weights(self._work, stage, name))
        return rounded(module)


def rounded(module: nn.Module) -> nn.Module:
    """Rounded to bf16, computing in float32, not to be trained."""
    return module.bfloat16().float().requires_grad_(False).eval()


def main() -> None:
    """Run the stages named on the command line, or all."""
    parser = argparse.ArgumentParser(
        prog="script/miniature/train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}")
    parser.add_argument("--work", type=Path, default=Path(".miniature"))
    parser.add_argument("--directory", type=Path, default=Path("weights/nano"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compile", action="store_true", help="compile dev, for faster steps")
    arguments = parser.parse_args()
    if unknown := set(arguments.stages) - set(STAGES):
        parser.error(f"no such stage: {', '.join(sorted(unknown))}; stages: {', '.join(STAGES)}")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(arguments.threads)
    # bf16 attention's backward pass takes half the time on a CPU as products of matrices
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    recipe = Recipe(arguments.work, compiled=arguments.compile)
    for stage in arguments.stages or STAGES:
        logger.info("stage %s", stage)
        if stage == "export":
            recipe.export(arguments.directory)
        else:
            getattr(recipe, stage)()


if __name__ == "__main__":
    main()
