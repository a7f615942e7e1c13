"""Adapters from Replicate, from any URL, from data URIs and from this machine."""

import base64
import json
import traceback
from dataclasses import replace

import pytest

from lora.sources.url import unsigned
from tests.lora.files import safetensors
from tests.support.services import tar, trained_on_replicate
from weights.serving.errors import (
    AccessDeniedError,
    ForbiddenAddressError,
    InvalidFileError,
    NotFoundError,
    ReferenceFormatError,
    SourceUnavailableError,
    WeightsError,
)

OLD, NEW = safetensors("old"), safetensors("new")
VERSION = "0a" * 32


def public_only(settings):
    return replace(settings, http=replace(settings.http, allow_private_hosts=False))


def test_replicate_fine_tune_with_its_trigger_word(loader, replicate):
    replicate.add("fofr/flux-x", trained_on_replicate(OLD, trigger="ohwx"))
    loaded = loader.load("fofr/flux-x")
    assert (loaded.adapter.content, loaded.trigger_words) == ("old", ("ohwx",))


def test_replicate_retraining_is_picked_up_and_a_version_stays(hub, loader, replicate):
    replicate.add("fofr/flux-x", trained_on_replicate(OLD), VERSION)
    assert loader.load("fofr/flux-x").adapter.content == "old"
    assert loader.load(f"fofr/flux-x:{VERSION}").adapter.content == "old"
    replicate.add("fofr/flux-x", trained_on_replicate(NEW))
    assert loader.load("fofr/flux-x").adapter.content == "new"
    asked = len(hub.requests)
    assert loader.load(f"fofr/flux-x/{VERSION}").adapter.content == "old"
    assert len(hub.requests) == asked


def test_replicate_token_stays_on_its_host(hub, new_loader, replicate, settings):
    replicate.add("fofr/flux-x", trained_on_replicate(OLD))
    sources = replace(settings.deployment, replicate_token="r8_mine")
    new_loader(replace(settings, deployment=sources)).load("fofr/flux-x")
    assert {request.token for request in hub.seen("GET", "/_weights")} == {"r8_mine"}
    assert {request.token for request in hub.seen("GET", "/delivery/")} == {None}


def test_unknown_fine_tune_points_to_hugging_face(hub, loader):
    with pytest.raises(NotFoundError, match=r"huggingface\.co/owner/name"):
        loader.load("owner/name")
    hub.fail("/owner/name", 200, b"<html>sign in</html>", {"Content-Type": "text/html"})
    with pytest.raises(NotFoundError, match="offers no weights"):
        loader.load("owner/name")


@pytest.mark.parametrize("header", ["ETag", "Last-Modified"])
def test_url_is_revalidated_without_being_fetched_again(hub, new_loader, header):
    url = hub.add_file("/files/x.safetensors", OLD, etag=False, headers={header: '"old"'})
    assert new_loader().load(url).hit == "download"
    asked = hub.count("GET", "/files/")
    assert new_loader().load(url).hit == "disk"
    assert hub.count("GET", "/files/") == asked + 1
    hub.add_file("/files/x.safetensors", NEW, etag=False, headers={header: '"new"'})
    assert new_loader().load(url).adapter.content == "new"


def test_url_without_validators_is_never_served_stale(hub, loader):
    url = hub.add_file("/files/x.safetensors", OLD, etag=False)
    assert loader.load(url).adapter.content == "old"
    hub.add_file("/files/x.safetensors", NEW, etag=False)
    assert loader.load(url).adapter.content == "new"


@pytest.mark.parametrize("store", ["Amz", "Goog"])
def test_url_signed_anew_is_not_fetched_again(hub, loader, store):
    url = hub.add_file("/files/x.safetensors", OLD)
    loader.load(f"{url}?X-{store}-Signature=one&X-{store}-Expires=9")
    assert loader.load(f"{url}?X-{store}-Signature=two&X-{store}-Expires=9").hit == "memory"


def test_only_references_that_may_come_again_are_kept_for_good(hub, loader, settings):
    url = hub.add_file("/files/x.safetensors", OLD)
    for query in ("?X-Amz-Signature=one", "?X-Amz-Signature=two", ""):
        loader.load(url + query)
    records = (settings.cache.root / "records").glob("*.json")
    assert sorted(json.loads(path.read_text())["lasting"] for path in records) == [
        False, False, True, True,  # two signatures; the file itself and its plain URL
    ]  # fmt: skip


def test_what_one_signature_may_see_is_not_shown_to_another(hub, loader):
    url = hub.add_file("/files/x.safetensors", OLD)
    loader.load(f"{url}?sig=right")
    hub.fail("/files/", 403)
    with pytest.raises(AccessDeniedError, match="private or has expired"):
        loader.load(f"{url}?sig=wrong")
    hub.fail("/files/", 503, times=9)
    with pytest.raises(SourceUnavailableError):
        loader.load(f"{url}?sig=wrong")
    assert loader.load(f"{url}?sig=right").adapter.content == "old"


def test_unsigned_keeps_what_names_the_file():
    assert unsigned("https://u:p@Host/x.tar?id=5&X-Amz-Date=1&sig=s#f") == "https://host/x.tar?id=5"


def test_secrets_of_a_url_stay_out_of_logs_errors_and_the_cache(hub, loader, settings, caplog):
    caplog.set_level("INFO")
    url = hub.add_file("/files/x.safetensors", OLD) + "?sig=geheim"
    url = url.replace("http://", "http://me:geheim@")
    loader.load(url)
    hub.fail("/files/", 503, times=1)
    loader.load(url)
    hub.fail("/files/", 404)
    with pytest.raises(NotFoundError) as missing:
        loader.load(url)
    with pytest.raises(SourceUnavailableError) as unreachable:
        loader.load(url.replace(hub.url.rpartition(":")[2], "9"))  # where nobody listens
    kept = [p for p in settings.cache.root.rglob("*") if p.is_file()]
    assert len(kept) > 3
    assert all(b"geheim" not in path.read_bytes() for path in kept)
    errors = [line for e in (missing, unreachable) for line in traceback.format_exception(e.value)]
    assert "geheim" not in "".join([caplog.text, *errors])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"<!DOCTYPE html><title>Sign in</title>", "a web page"),
        (b'{"error": "expired"}', "a JSON answer, .*expired"),
        (b'{"url": "https://b.example/x?X-Amz-Signature=geheim"}', r"probably an error\. Check"),
        (b'{"error": "see https://b.example/x?token=geheim"}', r"probably an error\. Check"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a Git LFS pointer"),
        (b"PK\x03\x04\x14\x00\x08\x08" + bytes(40), "never read"),
        (b"", "it is empty"),
        (b"GGUF\x03\x00\x00\x00" + b"\x01" * 40, "a GGUF file"),
        (b"\x80\x04\x95\x01\x02\x00" + b"\x01" * 40, "never read"),
        (b"\x00" * 600, "neither a .safetensors file nor a tar"),
    ],
)
def test_other_files_that_pose_as_weights_are_named(hub, loader, settings, content, said):
    url = hub.add_file("/files/x.safetensors", content)
    with pytest.raises(InvalidFileError, match=said):
        loader.load(url)
    left = [*settings.cache.root.glob("objects/*"), *settings.cache.root.glob("parts/*")]
    assert left == []


def test_a_redirect_to_nowhere_is_a_refusal(hub, loader):
    """As S3 answers where the link names a wrong region."""
    url = hub.add_file("/files/x.safetensors", OLD)
    hub.fail("/files/", 301, b"<Error><Code>PermanentRedirect</Code></Error>", times=9)
    with pytest.raises(WeightsError, match=r"refuses the request \(HTTP 301\)"):
        loader.load(url)


def test_web_page_is_refused_before_it_is_fetched(hub, loader):
    url = hub.add_file("/x.safetensors", b"<html>", headers={"Content-Type": "text/html; a=b"})
    with pytest.raises(InvalidFileError, match="web page, not a file with weights"):
        loader.load(url)
    assert len(hub.requests) == 1


def test_tar_url_and_wrong_extension(hub, loader):
    archive = tar({"a/lora.safetensors": OLD})
    assert loader.load(hub.add_file("/a/trained_model.tar", archive)).adapter.content == "old"
    assert loader.load(hub.add_file("/a/odd.safetensors", archive)).adapter.content == "old"
    assert loader.load(hub.add_file("/a/odd.tar", NEW)).adapter.content == "new"


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: tar({"lora.safetensors": x})])
def test_data_uri(hub, loader, wrap):
    encoded = base64.b64encode(wrap(OLD)).decode()
    assert loader.load(f"data:;base64,{encoded}").adapter.content == "old"
    assert loader.load(f"data:application/x-tar;base64,{encoded}").hit == "memory"
    assert hub.requests == []


def test_local_file_only_where_allowed_and_noticed_when_changed(new_loader, settings, tmp_path):
    file = tmp_path / "mine.safetensors"
    file.write_bytes(OLD)
    with pytest.raises(ReferenceFormatError, match="LORA_ALLOW_LOCAL_PATHS=true"):
        new_loader().load(str(file))
    allowing = replace(
        settings, deployment=replace(settings.deployment, lora_allow_local_paths=True)
    )
    loader = new_loader(allowing)
    assert loader.load(str(file)).adapter.content == "old"
    file.write_bytes(NEW)
    assert loader.load(f"file://{file}").adapter.content == "new"
    archive = tmp_path / "mine.tar"
    archive.write_bytes(tar({"lora.safetensors": OLD}))
    assert loader.load(str(archive)).adapter.content == "old"
    assert archive.is_file()
    with pytest.raises(NotFoundError, match="no such file"):
        loader.load(str(tmp_path / "other.safetensors"))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "2130706433", "127.1", "0x7f.1"])
def test_private_hosts_are_refused_however_they_are_spelled(hub, new_loader, settings, host):
    url = hub.add_file("/files/x.safetensors", OLD).replace("127.0.0.1", host)
    loader = new_loader(public_only(settings))
    for text in (url, url.replace("http:", "https:")):
        with pytest.raises(ForbiddenAddressError, match="not on the public internet"):
            loader.load(text)
    assert hub.requests == []
