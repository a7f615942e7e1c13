"""What an operator can set about adapters. The environment is read here and nowhere else."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from weights.cache import CacheSettings
from weights.http import HttpSettings

_GIB = 1 << 30


@dataclass(frozen=True)
class SourceSettings:
    """Where the sources are, and the tokens for them; each token goes to its own source only.

    hf_cache_dir: where huggingface_hub keeps files; None for its own default.
    allow_local_paths: let a reference name a file on this machine.
    """

    hf_endpoint: str = "https://huggingface.co"
    civitai_endpoint: str = "https://civitai.com"
    replicate_endpoint: str = "https://replicate.com"
    hf_token: str | None = field(default=None, repr=False)
    civitai_token: str | None = field(default=None, repr=False)
    replicate_token: str | None = field(default=None, repr=False)
    hf_cache_dir: Path | None = None
    allow_local_paths: bool = False


@dataclass(frozen=True)
class LoaderSettings:
    """Everything about getting adapters.

    memory_bytes: budget for parsed adapters kept in host memory.
    attempts, backoff: tries of a source that does not answer, and seconds before the second.
    """

    cache: CacheSettings
    sources: SourceSettings = field(default_factory=SourceSettings)
    http: HttpSettings = field(default_factory=HttpSettings)
    memory_bytes: int = 8 * _GIB
    attempts: int = 5
    backoff: float = 1.0

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> "LoaderSettings":
        """Read the settings from environment variables.

        HF_ENDPOINT, CIVITAI_ENDPOINT, REPLICATE_ENDPOINT: URLs of the sources.
        HF_TOKEN, CIVITAI_API_TOKEN, REPLICATE_API_TOKEN: tokens for them.
        LORA_CACHE_DIR, LORA_CACHE_GB (50), LORA_MIN_FREE_GB (5): files on disk.
        LORA_MEMORY_GB (8): parsed adapters. LORA_MAX_FILE_GB (4): the largest file accepted.
        LORA_ALLOW_PRIVATE_HOSTS, LORA_ALLOW_LOCAL_PATHS: 1 or true to allow.

        The cache of Hugging Face is where huggingface_hub has it: HF_HOME or HF_HUB_CACHE.
        Raises ValueError if a size is not a number.
        """
        default = Path("~/.cache/flux-fine-tune/adapters").expanduser()
        return cls(
            cache=CacheSettings(
                root=Path(environ.get("LORA_CACHE_DIR") or default),
                max_bytes=_gib(environ, "LORA_CACHE_GB", 50),
                min_free_bytes=_gib(environ, "LORA_MIN_FREE_GB", 5),
            ),
            sources=_sources(environ),
            http=HttpSettings(
                allow_private_hosts=_flag(environ, "LORA_ALLOW_PRIVATE_HOSTS"),
                max_bytes=_gib(environ, "LORA_MAX_FILE_GB", 4),
            ),
            memory_bytes=_gib(environ, "LORA_MEMORY_GB", 8),
        )


def _sources(environ: Mapping[str, str]) -> SourceSettings:
    default = SourceSettings()
    return SourceSettings(
        hf_endpoint=_endpoint(environ, "HF_ENDPOINT", default.hf_endpoint),
        civitai_endpoint=_endpoint(environ, "CIVITAI_ENDPOINT", default.civitai_endpoint),
        replicate_endpoint=_endpoint(environ, "REPLICATE_ENDPOINT", default.replicate_endpoint),
        hf_token=_token(environ, "HF_TOKEN"),
        civitai_token=_token(environ, "CIVITAI_API_TOKEN"),
        replicate_token=_token(environ, "REPLICATE_API_TOKEN"),
        allow_local_paths=_flag(environ, "LORA_ALLOW_LOCAL_PATHS"),
    )


def _endpoint(environ: Mapping[str, str], name: str, default: str) -> str:
    return (environ.get(name) or default).rstrip("/")


def _token(environ: Mapping[str, str], name: str) -> str | None:
    return environ.get(name, "").strip() or None


def _flag(environ: Mapping[str, str], name: str) -> bool:
    return environ.get(name, "").strip().lower() in ("1", "true", "yes", "on")


def _gib(environ: Mapping[str, str], name: str, default: float) -> int:
    text = environ.get(name) or str(default)
    try:
        return int(float(text) * _GIB)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{name}={text!r} is not a number of gigabytes, like 2 or 0.5") from error
