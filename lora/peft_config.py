"""The settings of adapters that PEFT's `save_pretrained` wrote: in a file beside the weights."""

import json
from pathlib import Path, PurePosixPath

from weights.serving.errors import InvalidFileError

WEIGHTS_NAME, CONFIG_NAME = "adapter_model.safetensors", "adapter_config.json"
MAX_CONFIG_BYTES = 1 << 20
# What PEFT calls a kind -> its setting that holds the strength.
STRENGTHS = {"LORA": "lora_alpha", "LOHA": "alpha", "LOKR": "alpha"}
SETTINGS = (
    "r",
    "rank_pattern",
    "lora_alpha",
    "alpha",
    "alpha_pattern",
    "use_rslora",
    "init_lora_weights",
)


def config_of(weights: str) -> str | None:
    """The path at which PEFT puts the configuration of these weights; None if they are not PEFT's.

    Args:
        weights: a path in a repository, in a tar or on this machine.
    """
    path = PurePosixPath(weights)
    return str(path.with_name(CONFIG_NAME)) if path.name == WEIGHTS_NAME else None


def check_config_size(size: int, name: str) -> None:
    """Raise InvalidFileError if a configuration of so many bytes is not read.

    Args:
        size: in bytes.
        name: of the weights, for the message.
    """
    if size > MAX_CONFIG_BYTES:
        raise InvalidFileError(
            f"{name}: the {CONFIG_NAME} beside it has more than the {MAX_CONFIG_BYTES} bytes that "
            "are read. Save the adapter again with PEFT's save_pretrained."
        )


def read_settings(config: Path, name: str) -> str:
    """`settings_of` a file."""
    with config.open("rb") as file:
        return settings_of(file.read(MAX_CONFIG_BYTES + 1), name)


def settings_of(config: bytes, name: str) -> str:
    """The settings that give an adapter its strength, as JSON; empty if there are none.

    Args:
        config: the content of the file.
        name: of the weights, for the message.

    Raises:
        InvalidFileError: the configuration is too large, or not a JSON object.
    """
    check_config_size(len(config), name)
    try:
        found = json.loads(config)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise InvalidFileError(
            f"{name}: the {CONFIG_NAME} beside it, which holds its strength, is not a JSON object. "
            "Save the adapter again with PEFT's save_pretrained."
        )
    strength = STRENGTHS.get(str(found.get("peft_type", "LORA")))
    if strength is None or found.get(strength) is None:
        return ""
    return json.dumps({key: found[key] for key in SETTINGS if key in found}, sort_keys=True)
