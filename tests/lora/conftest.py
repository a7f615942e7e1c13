from dataclasses import replace

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from lora.loader import AdapterLoader
from lora.settings import LoaderSettings
from tests.lora.files import parse
from tests.lora.saved_by_peft import Case
from tests.support import tiny
from tests.support.services import Civitai, HuggingFace, Replicate, tar
from weights.download.cache import CacheSettings
from weights.download.http import HttpSettings
from weights.download.retry import RetryPolicy
from weights.serving.settings import Settings


@pytest.fixture
def settings(hub, tmp_path, monkeypatch):
    """Settings that lead to the stand-in hub, with short waits."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    return LoaderSettings(
        cache=CacheSettings(tmp_path / "cache", min_free_bytes=0),
        deployment=Settings(
            hf_endpoint=hub.url, civitai_endpoint=hub.url, replicate_endpoint=hub.url
        ),
        http=HttpSettings(allow_private_hosts=True, connect_timeout=1, read_timeout=1),
        retry=RetryPolicy(3, backoff=0.01),
    )


@pytest.fixture
def new_loader(settings):
    """Makes loaders, as a restarted or a second process would."""
    loaders = []

    def make(settings=settings, parse=parse):
        loaders.append(AdapterLoader(settings, parse))
        return loaders[-1]

    yield make
    for loader in loaders:
        loader.close()
    close_session()


@pytest.fixture
def loader(new_loader):
    return new_loader()


@pytest.fixture
def huggingface(hub):
    return HuggingFace(hub)


@pytest.fixture
def civitai(hub):
    return Civitai(hub)


@pytest.fixture
def replicate(hub):
    return Replicate(hub)


@pytest.fixture(params=tiny.SIZES, ids=lambda size: f"width{size.width}", scope="session")
def flux(request):
    """A transformer, a CLIP and a T5, of two sizes in turn."""
    return tiny.modules(request.param)


@pytest.fixture
def case(flux, settings, new_loader):
    allowing = replace(settings.deployment, lora_allow_local_paths=True)
    return Case(flux, replace(settings, deployment=allowing), new_loader)


@pytest.fixture
def serve(hub, huggingface, tmp_path):
    """Puts the files of an adapter where a kind of reference finds them; returns the reference."""

    def put(source, files):
        if source == "hub":
            huggingface.add("o/n", files)
            return "huggingface.co/o/n"
        if source == "path":
            for name, content in files.items():
                (tmp_path / "mine" / name).parent.mkdir(exist_ok=True, parents=True)
                (tmp_path / "mine" / name).write_bytes(content)
            return str(next((tmp_path / "mine").rglob("*.safetensors")))
        order = sorted(files, reverse=source.endswith("weights first"))
        return hub.add_file("/a.tar", tar({f"./{name}": files[name] for name in order}))

    return put
