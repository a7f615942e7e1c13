"""The pristine transformers, one for each variant, on the host.

Nobody writes them: they are what `flux/transformers.py` makes working weights from. A variant
whose float8 weights are on disk needs its pristine copy only for adapters and for bf16, so that one
is opened when its first weight is asked for; the others are opened in setup.
"""

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from flux.components import load_module, reading
from flux.memory import bytes_of
from flux.prequantized import Prequantized
from weights.inventory import Entry

logger = logging.getLogger(__name__)

PART = "transformer"  # the directory of a checkpoint that holds it


class Master:
    """One variant's pristine transformer.

    Args:
        variant: its name.
        template: a transformer of its configuration and dtype; its weights are not looked at.
        load: opens the pristine transformer.
        source: where that comes from, as the log shows it.
        prequantized: its float8 weights from disk, if there are any.
    """

    def __init__(
        self,
        variant: str,
        template: nn.Module,
        load: Callable[[], nn.Module],
        source: Path,
        prequantized: Prequantized | None = None,
    ) -> None:
        self.template = template
        self.prequantized = prequantized
        self._name = f"{variant} pristine"
        self._load = load
        self._source = source
        self._parameters: dict[str, Tensor] | None = None
        self._seconds = 0.0

    @property
    def is_open(self) -> bool:
        """Whether there is more than the template."""
        return self._parameters is not None

    def open(self) -> Mapping[str, Tensor]:
        """Return the pristine values by parameter name; the first call opens the files.

        Raises:
            CheckpointError: they cannot be opened.
        """
        if self._parameters is None:
            logger.info("Loading %s", self._name)
            start = time.perf_counter()
            self._parameters = dict(self._load().named_parameters())
            self._seconds = time.perf_counter() - start
            held = self.entry()
            logger.info("%s is in %s: %s", self._name, held.place, held.cost)
        return self._parameters

    def entry(self) -> Entry:
        """A row for the table of setup."""
        if self._parameters is None:
            later = f"{self._source}, with the first adapter or bf16 request"
            return Entry.later(self._name, bytes_of(self.template), later)
        return Entry.of(self._name, self._parameters.values(), self._source, self._seconds)


def template(variant: str, directory: Path, dtype: torch.dtype) -> nn.Module:
    """A transformer without memory, as config.json in `directory` describes it.

    Raises:
        CheckpointError: there is no such file, or not for a transformer of FLUX.1.
    """
    with reading(f"{variant} transformer", directory), torch.device("meta"):
        config = FluxTransformer2DModel.load_config(directory, local_files_only=True)
        module: nn.Module = FluxTransformer2DModel.from_config(config)
    return module.to(dtype)


def load_transformer(variant: str, directory: Path, dtype: torch.dtype) -> nn.Module:
    """The transformer of a checkpoint; where its files hold `dtype`, a memory map.

    Raises:
        CheckpointError: files or weights are missing, damaged, or of another shape.
    """
    return load_module(f"{variant} transformer", FluxTransformer2DModel, directory, dtype)
