"""Load one component of a checkpoint completely, or raise an error that says what to do.

When weights are missing, the libraries' own loaders only warn, and leave the weights random (text
encoders) or without memory (VAE, transformers). A tokenizer without its vocabulary maps every word
to the same token. Here each of these is an error.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from safetensors import SafetensorError
from torch import nn

from weights.serving.errors import sentences

CONFIGURATION = "tokenizer_config.json"
TRANSFORMER = "transformer"  # as pipelines call it, and a checkpoint its directory
ADVICE = "Fetch the checkpoint's files again: script/download, or a copy that is whole."


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be loaded; the message says what to do."""


def load_transformer(variant: str, directory: Path, dtype: torch.dtype) -> nn.Module:
    """The transformer of a checkpoint; where its files hold `dtype`, a memory map.

    Raises:
        CheckpointError: files or weights are missing, damaged, or of another shape.
    """
    return load_module(f"{variant} transformer", FluxTransformer2DModel, directory, dtype)


def load_skeleton(variant: str, directory: Path, dtype: torch.dtype) -> nn.Module:
    """A transformer without memory, as config.json in `directory` describes it.

    Raises:
        CheckpointError: there is no such file, or not for a transformer of FLUX.1.
    """
    with reading(f"{variant} transformer", directory), torch.device("meta"):
        config = FluxTransformer2DModel.load_config(directory, local_files_only=True)
        module: nn.Module = FluxTransformer2DModel.from_config(config)
    return module.to(dtype)


def load_module(name: str, kind: type[Any], directory: Path, dtype: torch.dtype) -> nn.Module:
    """Load a model of diffusers or transformers, all weights of it from safetensors files.

    If the files are stored in `dtype`, diffusers maps them into memory instead of reading them.

    Args:
        name: what messages call it.
        kind: its class.
        directory: with its config.json.
        dtype: of the parameters.

    Raises:
        CheckpointError: files or weights are missing, damaged, or of another shape.
    """
    options = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    module, found = load_component(name, kind, directory, **options)
    missing = sorted(found["missing_keys"])
    if missing or found["error_msgs"]:
        shown = ", ".join(missing[:3]) or found["error_msgs"][0]
        raise CheckpointError(
            f"{name}: cannot load {directory}: {len(missing)} weights of {kind.__name__} are "
            f"missing ({shown}). {ADVICE}"
        )
    loaded: nn.Module = module
    return loaded


def load_tokenizer(name: str, kind: type[Any], directory: Path) -> Any:  # noqa: ANN401
    """Load a tokenizer of transformers with its configuration and its vocabulary.

    The vocabulary is `tokenizer.json`, or the files that the class had before there was that.

    Raises:
        CheckpointError: one of them is missing or damaged.
    """
    known = dict(kind.vocab_files_names)
    whole = known.pop("tokenizer_file")
    wanted = [CONFIGURATION, *([whole] if (directory / whole).is_file() else known.values())]
    with reading(name, directory):
        if missing := [file for file in wanted if not (directory / file).is_file()]:
            raise FileNotFoundError(f"{' and '.join(missing)} missing")
        return kind.from_pretrained(directory, local_files_only=True)


def load_component(name: str, kind: type[Any], directory: Path, **options: object) -> Any:  # noqa: ANN401
    """Call a library's `from_pretrained` on a local directory; see `reading` for what it raises."""
    with reading(name, directory):
        return kind.from_pretrained(directory, local_files_only=True, **options)


@contextmanager
def reading(name: str, directory: Path) -> Iterator[None]:
    """Translate what the libraries raise while they read a directory.

    Raises:
        CheckpointError: the directory is not there, or its files do not serve.
    """
    try:
        if not directory.is_dir():  # the libraries would take it for a name on the hub
            raise FileNotFoundError("no such directory")
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        problem = f"{name}: cannot load {directory}: {error}"
        raise CheckpointError(sentences(problem, ADVICE)) from error
