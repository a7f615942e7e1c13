"""Adapters on Hugging Face, through the real client against the stand-in hub."""

import logging
import traceback
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from tests.lora.files import safetensors
from weights.serving.errors import (
    AccessDeniedError,
    DiskSpaceError,
    InvalidFileError,
    NotFoundError,
    SourceUnavailableError,
)

OLD, NEW = safetensors("old"), safetensors("new")


def with_token(settings, token):
    return replace(settings, deployment=replace(settings.deployment, hf_token=token))


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["any.safetensors"], "any.safetensors"),
        (["a.safetensors", "lora.safetensors"], "lora.safetensors"),
        (["lora.safetensors", "pytorch_lora_weights.safetensors"], "pytorch_lora_weights"),
        (["My_Style.safetensors", "my-style_000000500.safetensors"], "My_Style.safetensors"),
        (["step-1/lora.safetensors", "lora.safetensors"], "lora.safetensors"),
    ],
)
def test_choice_of_the_file(loader, huggingface, names, chosen):
    huggingface.add("owner/my-style", {name: safetensors(name) for name in names} | {"a.txt": b"x"})
    assert loader.load("huggingface.co/owner/my-style").adapter.content.startswith(chosen)


@pytest.mark.parametrize(
    "names",
    [
        ["a.safetensors", "b.safetensors"],
        ["step-1/lora.safetensors", "step-2/lora.safetensors"],
    ],
)
def test_unclear_choice_lists_the_files_and_how_to_name_one(loader, huggingface, names):
    huggingface.add("o/n", {name: safetensors(name) for name in names})
    with pytest.raises(NotFoundError) as caught:
        loader.load("huggingface.co/o/n")
    assert all(name in str(caught.value) for name in names)
    example = str(caught.value).rpartition("like ")[2]
    assert loader.load(example).adapter.content == names[0]


def test_folder_revision_and_file(loader, huggingface):
    repository = huggingface.add("o/n", {"a/1.safetensors": safetensors("1")})
    commit = repository.branches["main"]
    repository.commit({"a/1.safetensors": safetensors("2"), "b.safetensors": safetensors("b")})
    assert loader.load("huggingface.co/o/n/tree/main/a").adapter.content == "2"
    assert loader.load("hf.co/o/n/b.safetensors").adapter.content == "b"
    assert loader.load(f"hf.co/o/n/resolve/{commit}/a/1.safetensors").adapter.content == "1"


def test_missing_file_and_revision_say_what_there_is(loader, huggingface):
    huggingface.add("o/n", {"a.safetensors": OLD})
    with pytest.raises(NotFoundError, match=r"It has a\.safetensors"):
        loader.load("huggingface.co/o/n/blob/main/b.safetensors")
    with pytest.raises(NotFoundError, match="no such branch"):
        loader.load("huggingface.co/o/n/tree/v9")


def test_repository_without_safetensors(loader, huggingface):
    huggingface.add("o/n", {"pytorch_lora_weights.bin": b"pickle"})
    with pytest.raises(NotFoundError, match=r"no \.safetensors file, and no other format is read"):
        loader.load("huggingface.co/o/n")


def test_trigger_word_of_the_model_card(loader, huggingface):
    huggingface.add("o/n", {"a.safetensors": OLD}, card={"instance_prompt": "ohwx\ndog"})
    assert loader.load("huggingface.co/o/n").trigger_words == ("ohwx dog",)


def test_no_second_copy_on_disk(loader, huggingface, settings):
    huggingface.add("o/n", {"a.safetensors": OLD})
    loader.load("huggingface.co/o/n")
    everything = [*settings.cache.root.rglob("*"), *Path(constants.HF_HUB_CACHE).rglob("*")]
    copies = [p for p in everything if p.is_file() and not p.is_symlink() and p.read_bytes() == OLD]
    assert len(copies) == 1


def test_restart_fetches_nothing_again(hub, new_loader, huggingface):
    huggingface.add("o/n", {"a.safetensors": OLD})
    assert new_loader().load("huggingface.co/o/n").hit == "download"
    assert new_loader().load("huggingface.co/o/n").hit == "disk"
    assert hub.count("GET", "/cdn/") == 1


def test_retrained_model_is_picked_up(loader, huggingface):
    repository = huggingface.add("o/n", {"a.safetensors": OLD})
    assert loader.load("huggingface.co/o/n").adapter.content == "old"
    repository.commit({"a.safetensors": NEW})
    assert loader.load("huggingface.co/o/n").adapter.content == "new"


def test_commit_is_never_asked_about_twice(hub, loader, huggingface):
    repository = huggingface.add("o/n", {"a.safetensors": OLD})
    text = f"huggingface.co/o/n/tree/{repository.branches['main']}"
    loader.load(text)
    asked = len(hub.requests)
    assert loader.load(text).hit == "memory"
    assert len(hub.requests) == asked


def test_commit_of_one_hub_is_not_that_of_another(new_loader, huggingface, settings):
    repository = huggingface.add("o/n", {"a.safetensors": OLD})
    text = f"huggingface.co/o/n/tree/{repository.branches['main']}"
    new_loader().load(text)
    other = replace(settings.deployment, hf_endpoint="http://127.0.0.1:9")
    with pytest.raises(SourceUnavailableError):
        new_loader(replace(settings, deployment=other)).load(text)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_hub_down_serves_the_file_from_before(hub, new_loader, huggingface, caplog, status):
    huggingface.add("o/n", {"a.safetensors": OLD})
    new_loader().load("huggingface.co/o/n")
    hub.fail("/api/models/o/n", status)
    loaded = new_loader().load("huggingface.co/o/n")
    assert (loaded.adapter.content, loaded.hit) == ("old", "disk")
    assert "may be out of date" in caplog.text


def test_hub_down_without_a_file_says_try_again(hub, loader, huggingface):
    huggingface.add("o/n", {"a.safetensors": OLD})
    hub.fail("/api/models/o/n", 503, times=9)
    with pytest.raises(SourceUnavailableError, match=r"HTTP 503.*Try again later"):
        loader.load("huggingface.co/o/n")


def test_one_failure_of_the_hub_is_tried_again(hub, loader, huggingface):
    huggingface.add("o/n", {"a.safetensors": OLD})
    hub.fail("/api/models/o/n", 503)
    assert loader.load("huggingface.co/o/n").adapter.content == "old"


def test_a_limit_of_the_rate_that_lasts_long_is_not_waited_for(hub, loader, huggingface):
    huggingface.add("o/n", {"a.safetensors": OLD})
    hub.fail("/api/models/o/n", 429, headers={"RateLimit": '"api";r=0;t=158'}, times=9)
    with pytest.raises(SourceUnavailableError, match="HTTP 429"):
        loader.load("huggingface.co/o/n")
    assert hub.count("GET", "/api/models/") == 1


def test_a_cancel_is_heard_while_the_client_waits_for_the_limit_of_the_rate(
    hub, loader, huggingface
):
    huggingface.add("o/n", {"a.safetensors": OLD})
    hub.fail("/resolve/", 429, headers={"RateLimit": '"resolvers";r=0;t=1'}, times=2)

    def cancel_once_it_waits():
        if hub.count("HEAD", "/resolve/") == 2:  # the first is not tried again
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loader.load("huggingface.co/o/n", cancel_once_it_waits)
    assert hub.count("HEAD", "/resolve/") == 2  # the client still sleeps
    assert loader.load("huggingface.co/o/n").adapter.content == "old"


def test_deleted_repository_is_not_served_from_before(new_loader, huggingface):
    huggingface.add("o/n", {"a.safetensors": OLD})
    new_loader().load("huggingface.co/o/n")
    huggingface.remove("o/n")
    with pytest.raises(NotFoundError, match="no such repository, or it is private"):
        new_loader().load("huggingface.co/o/n")


def test_private_repository_asks_for_the_token(new_loader, huggingface, settings):
    huggingface.add("o/n", {"a.safetensors": OLD}, token="hf_mine")
    with pytest.raises(NotFoundError, match=r"HF_TOKEN \(none is set\)"):
        new_loader().load("huggingface.co/o/n")
    loaded = new_loader(with_token(settings, "hf_mine")).load("huggingface.co/o/n")
    assert loaded.adapter.content == "old"


@pytest.mark.parametrize("gated", [True, False])
def test_file_fetched_with_a_token_is_not_served_without_it(
    new_loader, huggingface, settings, gated
):
    repository = huggingface.add("o/n", {"a.safetensors": OLD}, token="hf_mine", gated=gated)
    at_commit = f"huggingface.co/o/n/tree/{repository.branches['main']}"
    for text in ("huggingface.co/o/n", at_commit):
        new_loader(with_token(settings, "hf_mine")).load(text)
        for other in (None, "hf_other"):
            with pytest.raises((AccessDeniedError, NotFoundError)):
                new_loader(with_token(settings, other)).load(text)


def test_gated_repository_says_what_to_accept(loader, huggingface):
    huggingface.add("o/n", {"a.safetensors": OLD}, token="hf_mine", gated=True)
    with pytest.raises(AccessDeniedError, match=r"gated\. Accept its conditions"):
        loader.load("huggingface.co/o/n")


def test_token_goes_to_the_hub_only_and_into_no_log(hub, new_loader, huggingface, settings, caplog):
    caplog.set_level(logging.INFO)
    huggingface.add("o/n", {"a.safetensors": OLD}, token="hf_mine")
    new_loader(with_token(settings, "hf_mine")).load("huggingface.co/o/n")
    assert {request.token for request in hub.seen("GET", "/api/")} == {"hf_mine"}
    assert [request.token for request in hub.seen("GET", "/cdn/")] == [None]
    assert "hf_mine" not in caplog.text
    assert "secret-of-the-storage" not in caplog.text


def test_wrong_hash_is_refused_and_not_kept(loader, huggingface):
    repository = huggingface.add("o/n", {"a.safetensors": OLD}, announced_sha256="0" * 64)
    with pytest.raises(InvalidFileError, match="announces 000"):
        loader.load("huggingface.co/o/n")
    repository.announced_sha256 = None
    assert loader.load("huggingface.co/o/n").hit == "download"


def test_broken_connection_is_resumed(hub, loader, huggingface):
    huggingface.add("o/n", {"a.safetensors": safetensors("big", 100_000)})
    hub.cut("/cdn/", after=60_000)
    assert loader.load("huggingface.co/o/n").adapter.content == "big"


def test_cancel_during_a_download_leaves_nothing_half_done(hub, loader, huggingface):
    huggingface.add("o/n", {"a.safetensors": OLD})

    def cancel_when_bytes_come():
        if hub.count("GET", "/cdn/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loader.load("huggingface.co/o/n", cancel_when_bytes_come)
    assert loader.load("huggingface.co/o/n").hit == "download"


@pytest.fixture
def xet(monkeypatch):
    """The Hub's own protocol, as an operator may want it."""
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    monkeypatch.setenv("HF_XET_CLIENT_RETRY_MAX_ATTEMPTS", "1")


def test_the_hubs_own_protocol_is_taken_only_where_the_operator_says_so(
    hub, loader, huggingface, xet, caplog
):
    """Nobody listens where it would find the file."""
    repository = huggingface.add("o/n", {"a.safetensors": OLD})
    with pytest.raises(SourceUnavailableError, match=r"o/n.*broke off\. Try again later") as caught:
        loader.load("huggingface.co/o/n")
    assert hub.count("GET", "/cdn/") == 0
    assert "127.0.0.1:9" not in "".join(traceback.format_exception(caught.value))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("HF_HUB_DISABLE_XET")
        assert loader.load("huggingface.co/o/n").adapter.content == "old"
    assert hub.count("GET", "/cdn/") == 1
    repository.commit({"a.safetensors": NEW})
    huggingface_hub.constants.HF_HUB_DISABLE_XET = False
    assert loader.load("huggingface.co/o/n").adapter.content == "old"
    assert "Using the file from before" in caplog.text


FULL = "Task error: IO error: No space left on device (os error 28)"
SHORT = "Consistency check failed: file should be of size 90 but has size 80"


@pytest.mark.parametrize(
    ("failure", "error", "said"),
    [
        (RuntimeError(FULL), DiskSpaceError, "the disk is full"),
        (OSError(SHORT), SourceUnavailableError, "broke off"),
    ],
)
def test_what_the_client_meets_on_the_way(loader, huggingface, monkeypatch, failure, error, said):
    def fail(*_, **__):
        raise failure

    huggingface.add("o/n", {"a.safetensors": OLD})
    monkeypatch.setattr("lora.sources.huggingface.hf_hub_download", fail)
    with pytest.raises(error, match=said):
        loader.load("huggingface.co/o/n")


def test_checkpoint_is_refused_by_its_size_before_it_is_fetched(
    hub, new_loader, huggingface, settings
):
    huggingface.add("o/n", {"flux.safetensors": safetensors("x", 5000)})
    small = replace(settings, http=replace(settings.http, max_bytes=1000))
    with pytest.raises(InvalidFileError, match="whole checkpoint"):
        new_loader(small).load("huggingface.co/o/n")
    assert hub.count("GET", "/cdn/") == 0
