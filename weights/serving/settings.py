"""Deployment settings: one frozen dataclass, read from environment variables in one place."""
# ruff: noqa: RUF009  (`_setting` makes a field, as dataclasses.field does)

import math
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from weights.manifest import REPOSITORIES

T = TypeVar("T")
U = TypeVar("U")
GB = 1_000_000_000  # as the field writes sizes of weights
MAX_INPUT_MEGAPIXELS = 170

Dtype = Literal["auto", "bfloat16", "float32"]
Fp8Activations = Literal["auto", "fp8", "bf16"]
AtStart = Literal["all", "bf16", "fp8"]
Offload = Literal["none", "t5", "all"]
Compile = Literal["auto", "on", "off"]
SafetyPolicy = Literal["auto", "official", "any", "compvis", "falconsai", "open_nsfw"]


class SettingsError(ValueError):
    """An environment variable holds something that its setting cannot take."""


def _flag(text: str) -> bool:
    try:
        return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}[
            text.lower()
        ]
    except KeyError:
        raise ValueError("expected true or false") from None


def _one_of(choices: Any) -> Callable[[str], Any]:  # noqa: ANN401  (a Literal has no type)
    """Reads one of the strings of a Literal."""

    def read(text: str) -> str:
        if text not in get_args(choices):
            raise ValueError(f"expected one of {', '.join(get_args(choices))}")
        return text

    return read


def _number(
    read: Callable[[str], float], least: float, most: float, expected: str
) -> Callable[[str], Any]:
    """Reads a number within limits; `expected` says which."""

    def read_within(text: str) -> float:
        with suppress(ValueError, OverflowError):
            if least <= (value := read(text)) <= most:
                return value
        raise ValueError(f"expected {expected}")

    return read_within


_probability = _number(float, 0, 1, "a number from 0 to 1")
_input_megapixels = _number(  # Pillow itself refuses larger images
    int, 1, MAX_INPUT_MEGAPIXELS, f"a whole number from 1 to {MAX_INPUT_MEGAPIXELS}"
)
_gigabytes = _number(
    lambda text: int(float(text) * GB), 0, math.inf, "gigabytes as a number of at least 0, like 4"
)


def _url(text: str) -> str:
    if not re.fullmatch(r"(?i:https?)://[^\s/]\S*", text):
        raise ValueError("expected a URL that begins with https:// or http://")
    return text.rstrip("/")


def _token(text: str) -> str:
    if not (text.isascii() and text.isprintable() and " " not in text):
        raise ValueError("expected a token of printable ASCII characters without spaces")
    return text


def _setting(variable: str, read: Callable[[str], T], default: U, *, secret: bool = False) -> T | U:
    """A dataclass field that `Settings.from_environment` reads from `variable`."""
    metadata = {"variable": variable, "read": read}
    value: U = field(default=default, metadata=metadata, repr=not secret)
    return value


def _revisions(text: str) -> tuple[tuple[str, str], ...]:
    """Reads `dev=main,compvis=refs/pr/41`."""
    pairs = [pair.strip().partition("=")[::2] for pair in text.split(",")]
    short = [repository.short for repository in REPOSITORIES.values()]
    if any(name not in short or not revision for name, revision in pairs):
        raise ValueError(f"expected NAME=REVISION,... with names of {', '.join(short)}")
    return tuple(pairs)


@dataclass(frozen=True)
class Settings:
    """What the operator decides; everything about a single request is in `flux.request`.

    Attributes:
        checkpoint: `official`, `nano` (the embedded miniature), a directory with the
            subdirectories `dev` and `schnell`, the URL of a tar of such a directory, or
            `auto`: official where CUDA is there, else nano.
        quantized_directory: holds the float8 transformers of this checkpoint, as script/quantize
            writes them; None: they are made from the bf16 ones.
        revisions: (repository, branch, tag, commit or refs/pr/NUMBER) where an official repository
            is wanted at another revision than that of weights/manifest.py.
        cache_directory: `adapters`, `checkpoints` (from URLs) and `compiled` (kernels) in it are
            kept between starts.
        device: a torch device, or `auto`: `cuda` where it is there, else `cpu`.
        dtype: the compute dtype of "bf16" requests; `auto` is bfloat16 on CUDA and float32
            on a CPU, where bfloat16 is several times slower.
        fp8_activations: whether go_fast's linears quantize their inputs (`fp8`) or not (`bf16`);
            `auto` does where that is faster.
        at_start: which precisions are brought to the device in setup, `all`, `bf16` or `fp8`; the
            others come with the first request for them.
        offload: what lives on the host and visits the device layer by layer: `none`, `t5`, or
            `all`, T5 and the transformers.
        device_memory_bytes: what all weights on the device may take together; None is what is
            free there, less a reserve for activations.
        host_memory_bytes: what weights may take in page-locked host memory, offloaded ones first;
            None is what the machine or container has, less a reserve.
        compile: whether the transformers' blocks are compiled; `auto` is on with CUDA.
        attention_backend: a name of diffusers' attention backends; `auto` is PyTorch's own.
        output_directory: holds the output files until the next request; None is the system's
            temporary directory.
        max_input_megapixels: larger input images (in 1024 x 1024 pixels) are refused.
        nsfw_threshold: the open_nsfw score, 0 to 1, from which an image is withheld.
        safety_policy: which checkers look at an image, and when it is withheld
            (safety/policy.py); `auto` is official for a checkpoint that comes with the official
            checkers, else open_nsfw.
        allow_disable_safety_checker: whether the input `disable_safety_checker` is obeyed.
        lora_cache_bytes: budget for adapter files on disk. Files from the Hugging Face hub stay in
            huggingface_hub's own cache (HF_HOME) and count towards it.
        lora_device_bytes: budget for adapters on the device; 0: they are merged from the host.
        lora_max_file_bytes: the largest adapter file accepted.
        lora_allow_private_hosts: download from addresses outside the public internet.
        lora_allow_local_paths: let a caller name a file on this machine.
        *_endpoint, *_token: each source's URL, and the token that goes to it alone.
    """

    checkpoint: str = _setting("FLUX_CHECKPOINT", str, "auto")
    quantized_directory: Path | None = _setting("FLUX_QUANTIZED_DIRECTORY", Path, None)
    revisions: tuple[tuple[str, str], ...] = _setting("FLUX_REVISIONS", _revisions, ())
    cache_directory: Path = _setting("FLUX_CACHE_DIRECTORY", Path, Path("~/.cache/flux-fine-tune"))
    device: str = _setting("FLUX_DEVICE", str, "auto")
    dtype: Dtype = _setting("FLUX_DTYPE", _one_of(Dtype), "auto")
    fp8_activations: Fp8Activations = _setting(
        "FLUX_FP8_ACTIVATIONS", _one_of(Fp8Activations), "auto"
    )
    at_start: AtStart = _setting("FLUX_AT_START", _one_of(AtStart), "all")
    offload: Offload = _setting("FLUX_OFFLOAD", _one_of(Offload), "none")
    device_memory_bytes: int | None = _setting("FLUX_DEVICE_MEMORY_GB", _gigabytes, None)
    host_memory_bytes: int | None = _setting("FLUX_HOST_MEMORY_GB", _gigabytes, None)
    compile: Compile = _setting("FLUX_COMPILE", _one_of(Compile), "auto")
    attention_backend: str = _setting("FLUX_ATTENTION_BACKEND", str, "auto")
    output_directory: Path | None = _setting("FLUX_OUTPUT_DIRECTORY", Path, None)
    max_input_megapixels: int = _setting("FLUX_MAX_INPUT_MEGAPIXELS", _input_megapixels, 64)
    nsfw_threshold: float = _setting("FLUX_NSFW_THRESHOLD", _probability, 0.8)
    safety_policy: SafetyPolicy = _setting("FLUX_SAFETY_POLICY", _one_of(SafetyPolicy), "auto")
    allow_disable_safety_checker: bool = _setting("FLUX_ALLOW_DISABLE_SAFETY_CHECKER", _flag, True)
    lora_cache_bytes: int = _setting("LORA_CACHE_GB", _gigabytes, 50 * GB)
    lora_device_bytes: int = _setting("LORA_DEVICE_MEMORY_GB", _gigabytes, GB)
    lora_max_file_bytes: int = _setting("LORA_MAX_FILE_GB", _gigabytes, 4 * GB)
    lora_allow_private_hosts: bool = _setting("LORA_ALLOW_PRIVATE_HOSTS", _flag, False)
    lora_allow_local_paths: bool = _setting("LORA_ALLOW_LOCAL_PATHS", _flag, False)
    hf_endpoint: str = _setting("HF_ENDPOINT", _url, "https://huggingface.co")
    civitai_endpoint: str = _setting("CIVITAI_ENDPOINT", _url, "https://civitai.com")
    replicate_endpoint: str = _setting("REPLICATE_ENDPOINT", _url, "https://replicate.com")
    hf_token: str | None = _setting("HF_TOKEN", _token, None, secret=True)
    civitai_token: str | None = _setting("CIVITAI_API_TOKEN", _token, None, secret=True)
    replicate_token: str | None = _setting("REPLICATE_API_TOKEN", _token, None, secret=True)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Settings":
        """Read every variable that is set and not empty; raise SettingsError for a bad one."""
        values: dict[str, Any] = {}
        for setting in fields(cls):
            variable = setting.metadata["variable"]
            text = environment.get(variable, "").strip()
            if not text:
                continue
            try:
                values[setting.name] = setting.metadata["read"](text)
            except ValueError as error:
                is_secret = not setting.repr or "@" in text  # a URL may hold a password
                given = variable if is_secret else f"{variable}={text!r}"
                raise SettingsError(f"{given}: {error}") from error
        return cls(**values)
