"""The hub with the official repositories."""

import pytest
from huggingface_hub.utils import close_session

from tests.support.services import HuggingFace
from weights.download.retry import RetryPolicy
from weights.manifest import REPOSITORIES
from weights.repository import HubSettings


@pytest.fixture
def settings(hub, tmp_path):
    yield HubSettings(hub.url, cache_dir=tmp_path / "hf", retry=RetryPolicy(2, backoff=0.01))
    close_session()


@pytest.fixture
def huggingface(hub, official_files):
    """The hub with the four repositories, by their part."""
    huggingface = HuggingFace(hub)
    return {part: huggingface.add(r.name, official_files[part]) for part, r in REPOSITORIES.items()}
