"""Adapters on CivitAI: pages, versions, downloads and their errors."""

import json
from dataclasses import replace

import pytest

from lora.sources.civitai import OTHER_SITES, CivitaiReference
from tests.lora.files import safetensors
from tests.support.hub import Hub
from tests.support.services import CIVITAI_LOGIN, Civitai
from weights.serving.errors import (
    AccessDeniedError,
    InvalidFileError,
    NotFoundError,
    SourceUnavailableError,
    WeightsError,
)
from weights.serving.settings import Settings

OLD, NEW = safetensors("old"), safetensors("new")


def with_token(settings, token):
    return replace(settings, deployment=replace(settings.deployment, civitai_token=token))


def test_page_means_the_newest_version_and_page_with_version_that_one(loader, civitai):
    civitai.add(5, 50, OLD)
    civitai.add(5, 51, NEW)
    assert loader.load("https://civitai.com/models/5/some-slug").adapter.content == "new"
    assert loader.load("civitai.com/models/5?modelVersionId=50").adapter.content == "old"
    assert loader.load("civitai.com/api/download/models/50?type=Model").adapter.content == "old"


def test_number_of_a_model_is_not_that_of_a_version(loader, civitai):
    civitai.add(5, 7, safetensors("of model 5"))
    civitai.add(7, 9, safetensors("of model 7"))
    assert loader.load("civitai.com/models/7").adapter.content == "of model 7"
    assert loader.load("civitai.com/api/download/models/7").adapter.content == "of model 5"
    with pytest.raises(NotFoundError, match=r"write civitai\.com/models/5"):
        loader.load("civitai.com/api/download/models/5")
    with pytest.raises(NotFoundError, match=r"models/5\?modelVersionId=7"):
        loader.load("civitai.com/models/7?modelVersionId=7")


def test_newest_version_for_flux_is_chosen(loader, civitai):
    civitai.add(5, 50, OLD)
    civitai.add(5, 51, NEW, baseModel="SDXL 1.0")
    assert loader.load("civitai.com/models/5").adapter.content == "old"
    civitai.add(5, 52, NEW, baseModel="Flux.1 Kontext")
    assert loader.load("civitai.com/models/5").adapter.content == "old"
    civitai.add(6, 60, OLD, baseModel="Pony")
    with pytest.raises(NotFoundError, match="made for Pony"):
        loader.load("civitai.com/models/6")


def test_kin_of_flux_is_taken_with_a_warning_where_there_is_nothing_else(loader, civitai, caplog):
    civitai.add(5, 50, NEW, baseModel="SDXL 1.0")
    civitai.add(5, 51, OLD, baseModel="Flux.1 Krea")
    assert loader.load("civitai.com/models/5").adapter.content == "old"
    assert "civitai.com/models/5 is made for Flux.1 Krea" in caplog.text


def test_trained_words_are_reported(loader, civitai):
    civitai.add(5, 50, OLD, trainedWords=["ohwx", "style of x"])
    assert loader.load("civitai.com/models/5").trigger_words == ("ohwx", "style of x")
    civitai.add(6, 60, OLD, trainedWords=list(map(str, range(1000))))
    assert loader.load("civitai.com/models/6").trigger_words == tuple("0123456789")


def test_primary_safetensors_model_file_is_chosen(loader, civitai):
    version = civitai.add(5, 50, OLD)
    (file,) = version["files"]
    other = {"type": "Training Data", "name": "data.zip", "downloadUrl": "http://127.0.0.1:1/"}
    pickle = {**other, "type": "Model", "metadata": {"format": "PickleTensor"}, "primary": True}
    version["files"] = [other, pickle, file]
    assert loader.load("civitai.com/models/5").adapter.content == "old"
    version["files"] = [other, pickle]
    with pytest.raises(NotFoundError, match=r"no \.safetensors model, only data\.zip"):
        loader.load("civitai.com/models/5")


def test_size_that_the_site_rounds_is_no_promise(loader, civitai):
    civitai.add(5, 50, OLD)["files"][0]["sizeKB"] = 0.1
    assert loader.load("civitai.com/models/5").adapter.content == "old"


def test_checkpoint_is_refused(loader, civitai):
    civitai.add(5, 50, OLD, type="Checkpoint")
    for text in ("civitai.com/models/5", "civitai.com/models/5?modelVersionId=50"):
        with pytest.raises(WeightsError, match=r"whole checkpoint\. Choose a LoRA"):
            loader.load(text)


def test_wrong_hash_is_refused_and_not_kept(hub, loader, civitai):
    version = civitai.add(5, 50, OLD)
    right = version["files"][0]["hashes"]["SHA256"]
    version["files"][0]["hashes"] = {"SHA256": "F" * 64}
    with pytest.raises(InvalidFileError, match="announces ffff"):
        loader.load("civitai.com/models/5")
    version["files"][0]["hashes"] = {"SHA256": right}
    assert loader.load("civitai.com/models/5").adapter.content == "old"


def test_token_opens_the_download_and_stays_off_the_storage(hub, new_loader, civitai, settings):
    civitai.add(5, 50, OLD, token="mine")
    with pytest.raises(AccessDeniedError) as caught:
        new_loader().load("civitai.com/models/5")
    assert CIVITAI_LOGIN in str(caught.value)
    assert "set CIVITAI_API_TOKEN" in str(caught.value)
    with pytest.raises(
        AccessDeniedError, match="token in CIVITAI_API_TOKEN is not valid"
    ) as caught:
        new_loader(with_token(settings, "other-token")).load("civitai.com/models/5")
    assert "other-token" not in str(caught.value)
    loaded = new_loader(with_token(settings, "mine")).load("civitai.com/models/5")
    assert loaded.adapter.content == "old"
    assert [request.token for request in hub.seen("GET", "/civitai-storage/")] == [None]


def test_token_in_the_link_is_used_for_this_link_only(hub, loader, civitai, caplog):
    caplog.set_level("DEBUG", logger="lora")
    civitai.add(5, 50, OLD, token="mine")
    assert loader.load("civitai.com/models/5?token=mine").adapter.content == "old"
    with pytest.raises(AccessDeniedError):
        loader.load("civitai.com/models/5")
    with pytest.raises(AccessDeniedError):
        loader.load("civitai.com/models/5?modelVersionId=50&token=wrong")
    assert "mine" not in caplog.text


def test_token_is_not_sent_to_another_host_that_the_api_names(hub, new_loader, civitai, settings):
    version = civitai.add(5, 50, OLD)
    version["files"][0]["downloadUrl"] = hub.storage_url + "/civitai-storage/50"
    loaded = new_loader(with_token(settings, "mine")).load("civitai.com/models/5")
    assert loaded.adapter.content == "old"
    assert [request.token for request in hub.seen("GET", "/civitai-storage/")] == [None]


@pytest.mark.parametrize(
    ("status", "body", "error", "said"),
    [
        (403, {"error": "Early Access", "deadline": "2031-02-03"}, AccessDeniedError, "2031-02-03"),
        (403, {"error": "no\nUsing seed: 1"}, AccessDeniedError, "no Using seed: 1"),
        (404, {"error": "Model not found"}, NotFoundError, "Model not found"),
        (410, {"error": "archived"}, NotFoundError, "archived"),
        (429, {"error": "Too many requests"}, SourceUnavailableError, "Try again later"),
    ],
)
def test_errors_of_the_download_reach_the_user(hub, loader, civitai, status, body, error, said):
    civitai.add(5, 50, OLD)
    hub.fail("/api/download/", status, json.dumps(body).encode(), times=9)
    with pytest.raises(error) as caught:
        loader.load("civitai.com/models/5")
    assert said in str(caught.value)
    assert "civitai.com/models/5" in str(caught.value)


def test_unknown_model(loader, civitai):
    with pytest.raises(NotFoundError, match=r"civitai\.com/models/5: not found"):
        loader.load("civitai.com/models/5")


@pytest.mark.parametrize("body", [b"<html>maintenance</html>", b"[]", b'{"modelVersions": 3}'])
def test_answers_of_another_form_are_survived(hub, loader, civitai, body):
    civitai.add(5, 50, OLD)
    hub.fail("/api/v1/", 200, body, times=9)
    with pytest.raises(WeightsError, match=r"civitai\.com/models/5"):
        loader.load("civitai.com/models/5")


def test_version_is_never_asked_about_twice_but_a_page_is(hub, loader, civitai):
    civitai.add(5, 50, OLD)
    for text, requests in (
        ("civitai.com/models/5?modelVersionId=50", 0),
        ("civitai.com/models/5", 1),
    ):
        loader.load(text)
        asked = len(hub.requests)
        assert loader.load(text).hit == "memory"
        assert len(hub.requests) == asked + requests


def test_api_down_serves_the_file_from_before(hub, new_loader, civitai, caplog):
    civitai.add(5, 50, OLD)
    new_loader().load("civitai.com/models/5")
    hub.fail("/api/v1/", 503)
    assert new_loader().load("civitai.com/models/5").adapter.content == "old"
    assert "may be out of date" in caplog.text


@pytest.fixture
def other_site(settings, monkeypatch):
    """Another site of CivitAI, and settings that know of it, with a token for both."""
    with Hub() as hub:
        deployment = replace(settings.deployment, civitai_token="mine")
        monkeypatch.setitem(OTHER_SITES, deployment.civitai_endpoint, (hub.url,))
        yield hub, Civitai(hub), replace(settings, deployment=deployment)


def test_what_one_site_does_not_have_is_asked_for_at_the_other(hub, new_loader, other_site):
    other, red, settings = other_site
    red.add(5, 50, OLD, token="mine")
    for text in ("civitai.com/models/5", "civitai.red/models/5?modelVersionId=50"):
        assert new_loader(settings).load(text).adapter.content == "old"
    assert {request.token for request in hub.seen("GET", "/api/v1/")} == {"mine"}
    assert {request.token for request in other.seen("GET", "/api/")} == {"mine"}
    assert [request.token for request in other.seen("GET", "/civitai-storage/")] == [None]
    with pytest.raises(NotFoundError, match=r"civitai\.com/models/6: not found"):
        new_loader(settings).load("civitai.com/models/6")


def test_the_first_site_is_asked_first(new_loader, civitai, other_site):
    other, red, settings = other_site
    civitai.add(5, 50, OLD)
    red.add(5, 50, NEW)
    assert new_loader(settings).load("civitai.com/models/5").adapter.content == "old"
    assert not other.requests


def test_another_site_that_is_down_leaves_the_answer_of_the_first(new_loader, other_site):
    other, _, settings = other_site
    other.fail("/api/v1/", 503, times=9)
    with pytest.raises(NotFoundError, match=r"civitai\.com/models/5: not found"):
        new_loader(settings).load("civitai.com/models/5")
    assert other.count("GET", "/api/v1/") == 1  # or a misspelt number would take long to be refused


def test_a_file_of_several_by_its_number(loader, civitai):
    version = civitai.add(5, 50, OLD)
    civitai.add(6, 60, NEW)
    (main,) = version["files"]
    (second,) = civitai.add(6, 61, NEW)["files"]
    version["files"][:] = [{**main, "id": 1}, {**second, "id": 2, "primary": False}]
    assert loader.load("urn:air:flux1:lora:civitai:5@50").adapter.content == "old"
    assert loader.load("urn:air:flux1:lora:civitai:5@50+2").adapter.content == "new"
    assert loader.load("civitai.com/api/download/models/50").adapter.content == "old"
    for page in ("api/download/models/50?", "models/5?modelVersionId=50&", "model-versions/50?"):
        assert loader.load(f"civitai.com/{page}fileId=2").adapter.content == "new"
    with pytest.raises(NotFoundError, match=r"no such \.safetensors file.*1 \(lora-50\.safetens"):
        loader.load("urn:air:flux1:lora:civitai:5@50+3")


def test_a_file_of_several_by_what_the_download_menu_asks_for(loader, civitai):
    version = civitai.add(5, 50, OLD)
    (main,) = version["files"]
    (second,) = civitai.add(6, 60, NEW)["files"]
    full = {**main, "metadata": {"format": "SafeTensor", "size": "full", "fp": "fp32"}}
    half = {**second, "metadata": {"format": "SafeTensor", "size": "pruned", "fp": "fp16"}}
    version["files"][:] = [full, {**half, "primary": False, "type": "Pruned Model"}]
    link = "civitai.com/api/download/models/50"
    assert loader.load(f"{link}?type=Model&format=SafeTensor").adapter.content == "old"
    menu = f"{link}?type=Pruned%20Model&format=SafeTensor&size=pruned&fp=fp16"
    assert loader.load(menu).adapter.content == "new"
    assert loader.load(f"{link}?type=Model&format=Diffusers&fp=bf16").adapter.content == "old"


def test_a_version_whose_only_file_is_pruned(loader, civitai):
    civitai.add(5, 50, OLD)["files"][0]["type"] = "Pruned Model"
    assert loader.load("civitai.com/model-versions/50").adapter.content == "old"


def test_only_the_public_site_has_others():
    reference = CivitaiReference(5)
    assert reference.credential(Settings()).others == ("https://civitai.red",)
    mirror = Settings(civitai_endpoint="https://mirror.example")
    assert reference.credential(mirror).others == ()
