"""The settings resolved for this machine: which checkpoint runs on which device, in which dtype."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from flux.components import CheckpointError
from flux.memory.offload import offloaded
from flux.variants import VARIANTS
from weights.checkpoint import directory_of, fetch_missing
from weights.serving.redact import without_secrets
from weights.serving.settings import Settings, SettingsError

logger = logging.getLogger(__name__)

NANO = Path(__file__).resolve().parent.parent / "weights" / "nano"


@dataclass(frozen=True)
class Deployment:
    """The resolved settings.

    Attributes:
        offloaded: components that stay on the host and are sent to the device layer by layer.
    """

    checkpoint: str
    device: torch.device
    dtype: torch.dtype
    offloaded: frozenset[str] = frozenset()

    @classmethod
    def choose(cls, settings: Settings) -> "Deployment":
        """Resolve every `auto`, and log the result.

        A CUDA device that is named by its number becomes the calling thread's current one.

        Raises:
            SettingsError: there is no such device, or it cannot offload.
        """
        device = _device(_unless_auto(settings.device, "cuda" if _has_cuda() else "cpu"))
        checkpoint = chosen_checkpoint(settings)
        on_cpu = device.type == "cpu"
        dtype = _unless_auto(settings.dtype, "float32" if on_cpu else "bfloat16")
        shown = without_secrets(checkpoint)
        logger.info("checkpoint %s on %s, computing in %s", shown, device, dtype)
        if checkpoint == "nano":
            logger.info(
                "nano is the embedded miniature, for trying out and testing; "
                "set FLUX_CHECKPOINT=official for FLUX.1"
            )
        if on_cpu and dtype == "float32":
            logger.info("bf16 requests compute in float32: most CPUs are far slower in bfloat16")
        on_host = offloaded(settings.offload, device)
        if on_host:
            logger.info("%s: on the host, brought layer by layer", " and ".join(sorted(on_host)))
        return cls(checkpoint, device, getattr(torch, dtype), on_host)

    def fetch_checkpoints(self, checkers: Sequence[str], settings: Settings) -> None:
        """Download the files that this start needs and that are missing.

        Args:
            checkers: parts of weights/manifest.py besides the variants.

        Raises:
            WeightsError: they cannot be had.
        """
        variants = () if self.checkpoint == "nano" else VARIANTS
        fetch_missing([*checkers, *variants], self.checkpoint, settings)


def chosen_checkpoint(settings: Settings) -> str:
    """FLUX_CHECKPOINT, with `auto` replaced."""
    return _unless_auto(settings.checkpoint, "official" if _has_cuda() else "nano")


def compute_fp32_in_fp32() -> None:
    """Forbid TF32 in products of fp32 tensors, in which adapters are summed up.

    torch allows it for convolutions, and TORCH_ALLOW_TF32_CUBLAS_OVERRIDE, which some images with
    CUDA set, for matrices.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def source_of(variant: str, checkpoint: str, settings: Settings) -> Path:
    """The directory that a variant is loaded from; missing files are downloaded.

    Raises:
        CheckpointError: there is no pipeline in it.
        WeightsError: it cannot be fetched.
    """
    if checkpoint == "nano":
        return NANO / variant
    directory = directory_of(variant, checkpoint, settings)
    if not (directory / "model_index.json").is_file():
        raise CheckpointError(
            f"FLUX_CHECKPOINT={without_secrets(checkpoint)}: {directory} holds no pipeline "
            "(model_index.json); expected official, nano, or a directory (or the URL of a tar) "
            "with dev and schnell"
        )
    return directory


def sources_of(checkpoint: str, settings: Settings) -> dict[str, Path]:
    """`source_of` every variant."""
    return {variant: source_of(variant, checkpoint, settings) for variant in VARIANTS}


def _has_cuda() -> bool:
    return torch.cuda.is_available()


def _unless_auto(setting: str, choice: str) -> str:
    return choice if setting == "auto" else setting


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(f"FLUX_DEVICE={name}: no such device here ({error})") from error
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # of this thread: Triton launches there, wherever tensors are
    return device
