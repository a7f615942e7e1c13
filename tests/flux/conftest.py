from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch.utils._device import _device_constructors

from flux.transformers.scaled import rows_taken
from lora.formats.adapter import Adapter
from tests.flux.library import Library
from tests.flux.merging import SIZE, files
from tests.support import tiny


@pytest.fixture(scope="session", autouse=True)
def _factories() -> None:
    """Have torch list what `with torch.device(...)` is for, once and before tests replace any."""
    _device_constructors()


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=str)
def modules(request):
    return tiny.modules(SIZE, request.param)


@pytest.fixture(scope="session")
def adapters(tmp_path_factory) -> dict[str, Adapter]:
    directory = tmp_path_factory.mktemp("adapters")
    found = tiny.modules(SIZE)
    return {
        name: tiny.load(directory / name, found, tensors, digest=name)
        for name, tensors in files().items()
    }


@pytest.fixture
def make_library(monkeypatch) -> Iterator[Callable[..., Library]]:
    """Makes a `Library`, of which no outcome is remembered afterwards, nor one of others by it."""
    rows_taken.cache_clear()
    yield partial(Library, monkeypatch)
    rows_taken.cache_clear()
