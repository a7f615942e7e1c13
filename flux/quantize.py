"""Quantize a checkpoint's transformers ahead of time: python -m flux.quantize, script/quantize."""

import argparse
import logging
import os
import sys
import time
from pathlib import Path

from flux.variants import VARIANTS
from weights.checkpoint import commit_of
from weights.serving.directories import usable
from weights.serving.errors import WeightsError
from weights.serving.quiet import importing_libraries, without_progress_bars
from weights.serving.redact import without_secrets
from weights.serving.settings import Settings, SettingsError

logger = logging.getLogger(__name__)


def main() -> int:
    """Write the files of the variants named on the command line; returns the exit code."""
    name = os.environ.get(
        "FLUX_COMMAND", "python -m flux.quantize"
    )  # script/quantize gives its own
    parser = argparse.ArgumentParser(
        prog=name,
        description="Write the float8 weights of a checkpoint's transformers to files that a "
        "server starts from. Needs no GPU. Settings are environment variables: FLUX_CHECKPOINT, "
        "FLUX_QUANTIZED_DIRECTORY, HF_TOKEN, ...",
    )
    parser.add_argument("variants", nargs="*", help=f"of {', '.join(VARIANTS)}; default: all")
    parser.add_argument(
        "--directory", type=Path, help="where to put the files; default: FLUX_QUANTIZED_DIRECTORY"
    )
    arguments = parser.parse_args()
    if unknown := set(arguments.variants) - set(VARIANTS):
        parser.error(f"no such variant: {', '.join(sorted(unknown))}")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for package in (__name__, "flux", "weights"):
        logging.getLogger(package).setLevel(logging.INFO)
    with importing_libraries():
        from flux.components import CheckpointError
    try:
        settings = Settings.from_environment()
        directory = arguments.directory or settings.quantized_directory
        if not directory:
            parser.error("name a directory: --directory, or FLUX_QUANTIZED_DIRECTORY")
        _quantize(arguments.variants or list(VARIANTS), directory, settings)
    except (CheckpointError, SettingsError, WeightsError) as error:
        logger.error("%s: %s", name, error)
        return 1
    return 0


def _quantize(variants: list[str], directory: Path, settings: Settings) -> None:
    with importing_libraries():
        import torch
        import torchao

        from flux.components import TRANSFORMER, load_transformer
        from flux.deployment import chosen_checkpoint, source_of
        from flux.transformers.prequantized import Identity, fingerprint_of, path_of, write

    without_progress_bars()
    torch.set_grad_enabled(False)
    checkpoint = chosen_checkpoint(settings)
    for variant in variants:
        start, source = time.perf_counter(), source_of(variant, checkpoint, settings)
        identity = Identity(
            variant=variant,
            checkpoint=without_secrets(checkpoint),
            commit=commit_of(variant, source),
            fingerprint=fingerprint_of(source / TRANSFORMER),
            torchao=torchao.__version__,
        )
        path = path_of(variant, usable(directory, "--directory or FLUX_QUANTIZED_DIRECTORY"))
        logger.info("Quantizing %s to %s", identity, path)
        transformer = load_transformer(variant, source / TRANSFORMER, torch.bfloat16)
        size = write(path, transformer, identity)
        seconds = time.perf_counter() - start
        logger.info("%s: %.3f GB, in %.1f s", path, size / 1e9, seconds)
    logger.info("A server takes them from FLUX_QUANTIZED_DIRECTORY=%s", directory)


if __name__ == "__main__":
    sys.exit(main())
