"""What getting adapters depends on, apart from the reference."""

from dataclasses import dataclass, field

from weights.download.cache import CacheSettings
from weights.download.http import HttpSettings
from weights.download.retry import RetryPolicy
from weights.serving.settings import GB, Settings


@dataclass(frozen=True)
class LoaderSettings:
    """Everything about getting adapters.

    Attributes:
        deployment: says where the sources are, which tokens are for them, and what is allowed.
        memory_bytes: budget for parsed adapters kept in host memory.
        retry: tries of a source that does not answer.
    """

    cache: CacheSettings
    deployment: Settings = field(default_factory=Settings)
    http: HttpSettings = field(default_factory=HttpSettings)
    memory_bytes: int = 8 * GB
    retry: RetryPolicy = field(default_factory=RetryPolicy)

    @classmethod
    def of(cls, settings: Settings) -> "LoaderSettings":
        """The part of the deployment's settings that is about adapters."""
        return cls(
            cache=CacheSettings(
                root=settings.cache_directory / "adapters",
                max_bytes=settings.lora_cache_bytes,
            ),
            deployment=settings,
            http=HttpSettings(
                allow_private_hosts=settings.lora_allow_private_hosts,
                max_bytes=settings.lora_max_file_bytes,
            ),
        )
