"""What getting adapters depends on, apart from the reference."""

from dataclasses import dataclass, field
from pathlib import Path

from weights.download.cache import CacheSettings
from weights.download.http import HttpSettings
from weights.serving.settings import GB, Settings

CIVITAI_OTHERS = ("https://civitai.red",)


@dataclass(frozen=True)
class SourceSettings:
    """Where the sources are, and the tokens for them; each token goes to its own source only.

    Attributes:
        civitai_others: CivitAI's other sites, asked for what the endpoint does not have.
        hf_cache_dir: where huggingface_hub keeps files; None for its own default.
        allow_local_paths: let a reference name a file on this machine.
    """

    hf_endpoint: str = Settings.hf_endpoint
    civitai_endpoint: str = Settings.civitai_endpoint
    replicate_endpoint: str = Settings.replicate_endpoint
    hf_token: str | None = field(default=None, repr=False)
    civitai_token: str | None = field(default=None, repr=False)
    replicate_token: str | None = field(default=None, repr=False)
    civitai_others: tuple[str, ...] = ()
    hf_cache_dir: Path | None = None
    allow_local_paths: bool = False


@dataclass(frozen=True)
class LoaderSettings:
    """Everything about getting adapters.

    Attributes:
        memory_bytes: budget for parsed adapters kept in host memory.
        attempts, backoff: tries of a source that does not answer, and seconds before the second.
    """

    cache: CacheSettings
    sources: SourceSettings = field(default_factory=SourceSettings)
    http: HttpSettings = field(default_factory=HttpSettings)
    memory_bytes: int = 8 * GB
    attempts: int = 5
    backoff: float = 1.0

    @classmethod
    def of(cls, settings: Settings) -> "LoaderSettings":
        """The part of the deployment's settings that is about adapters."""
        return cls(
            cache=CacheSettings(
                root=settings.cache_directory / "adapters",
                max_bytes=settings.lora_cache_bytes,
            ),
            sources=SourceSettings(
                hf_endpoint=settings.hf_endpoint,
                civitai_endpoint=settings.civitai_endpoint,
                civitai_others=_others(settings.civitai_endpoint),
                replicate_endpoint=settings.replicate_endpoint,
                hf_token=settings.hf_token,
                civitai_token=settings.civitai_token,
                replicate_token=settings.replicate_token,
                allow_local_paths=settings.lora_allow_local_paths,
            ),
            http=HttpSettings(
                allow_private_hosts=settings.lora_allow_private_hosts,
                max_bytes=settings.lora_max_file_bytes,
            ),
        )


def _others(endpoint: str) -> tuple[str, ...]:
    """The other sites of CivitAI; a mirror stands for all of them."""
    return CIVITAI_OTHERS if endpoint == Settings.civitai_endpoint else ()
