"""The disk: what leaves it first, what stays, and what happens where it is full."""

import errno
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants

from tests.lora.files import add_files, safetensors
from weights.serving.errors import DiskSpaceError


def hub_cache_is_full(place):
    """As `shutil.disk_usage`: the cache of huggingface_hub is on a disk of its own."""
    full = Path(place).is_relative_to(constants.HF_HUB_CACHE)
    return SimpleNamespace(total=1 << 41, free=0 if full else 1 << 40)


def test_disk_budget_evicts_also_from_the_cache_of_huggingface(
    hub, new_loader, huggingface, settings
):
    size = len(safetensors("hub"))
    tight = replace(settings, cache=replace(settings.cache, max_bytes=size))
    huggingface.add("o/n", {"a.safetensors": safetensors("hub")})
    (text,) = add_files(hub, "url")
    new_loader(tight).load("huggingface.co/o/n")
    assert new_loader(tight).load("huggingface.co/o/n").hit == "disk"
    new_loader(tight).load(text)
    blobs = Path(constants.HF_HUB_CACHE).rglob("blobs/*")
    assert [path for path in blobs if path.is_file()] == []
    assert new_loader(tight).load("huggingface.co/o/n").hit == "download"


def test_files_leave_the_cache_of_huggingface_where_it_was(
    hub, new_loader, huggingface, settings, monkeypatch, tmp_path
):
    loader = new_loader(replace(settings, cache=replace(settings.cache, max_bytes=100)))
    huggingface.add("o/n", {"a.safetensors": safetensors("hub")})
    loader.load("huggingface.co/o/n")
    blobs = Path(constants.HF_HUB_CACHE)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "new"))
    loader.load(add_files(hub, "url")[0])
    assert [path for path in blobs.rglob("blobs/*") if path.is_file()] == []


def test_file_that_was_in_the_cache_of_huggingface_before_is_left_there(
    hub, new_loader, huggingface, settings
):
    huggingface.add("o/n", {"a.safetensors": safetensors("hub")})
    new_loader().load("huggingface.co/o/n")
    elsewhere = replace(settings.cache, root=settings.cache.root / "other", max_bytes=0)
    loader = new_loader(replace(settings, cache=elsewhere))
    assert loader.load("huggingface.co/o/n").hit == "disk"
    loader.load(add_files(hub, "url")[0])
    assert hub.count("GET", "/cdn/") == 1
    assert loader.load("huggingface.co/o/n").hit == "memory"
    assert hub.count("GET", "/cdn/") == 1


def test_what_the_cache_of_huggingface_has_needs_no_room_there(
    new_loader, huggingface, settings, monkeypatch
):
    huggingface.add("o/n", {"a.safetensors": safetensors("old")})
    new_loader().load("huggingface.co/o/n")
    monkeypatch.setattr("shutil.disk_usage", hub_cache_is_full)
    new = replace(settings.cache, root=settings.cache.root.parent / "new")
    assert new_loader(replace(settings, cache=new)).load("huggingface.co/o/n").hit == "disk"


def test_an_adapter_in_memory_needs_no_room_on_the_disk(hub, loader, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    known, new = add_files(hub, "known", "new")
    loader.load(known)
    monkeypatch.setattr(Path, "write_text", full)
    monkeypatch.setattr(Path, "touch", full)
    assert loader.load(known).hit == "memory"
    with pytest.raises(DiskSpaceError, match=r"new\.safetensors: the disk is full\. Free some"):
        loader.load(new)


def test_what_is_used_from_memory_leaves_the_disk_last(hub, new_loader, settings):
    size = 2 * len(safetensors("a"))
    loader = new_loader(replace(settings, cache=replace(settings.cache, max_bytes=size)))
    first, second, third = add_files(hub, "a", "b", "c")
    for text in (first, second, first, third):
        loader.load(text)
    assert loader.load(first).hit == "memory"
    assert [new_loader().load(text).hit for text in (first, second)] == ["disk", "download"]


def test_what_killed_downloads_have_left_is_removed(loader, huggingface):
    repository = huggingface.add("o/n", {"a.safetensors": safetensors("old")})
    loader.load("huggingface.co/o/n")
    (blobs,) = Path(constants.HF_HUB_CACHE).rglob("blobs")
    left, another = blobs / "old.incomplete", blobs / "of another process.incomplete"
    left.touch()
    os.utime(left, (0, 0))
    another.touch()
    repository.commit({"a.safetensors": safetensors("new")})
    assert loader.load("huggingface.co/o/n").adapter.content == "new"
    assert list(blobs.glob("*.incomplete")) == [another]


def test_the_disk_of_the_cache_of_huggingface_must_have_room(loader, huggingface, monkeypatch):
    huggingface.add("o/n", {"a.safetensors": safetensors("old")})
    Path(constants.HF_HUB_CACHE).mkdir()
    monkeypatch.setattr("shutil.disk_usage", hub_cache_is_full)
    with pytest.raises(DiskSpaceError, match=r"No room for .* the disk of .*/hf is .* MB short"):
        loader.load("huggingface.co/o/n")


def test_a_file_of_this_machine_takes_no_room(hub, new_loader, settings, tmp_path):
    file = tmp_path / "mine.safetensors"
    file.write_bytes(safetensors("mine"))
    cache = replace(settings.cache, max_bytes=file.stat().st_size)
    allowing = replace(settings.deployment, lora_allow_local_paths=True)
    loader = new_loader(replace(settings, cache=cache, deployment=allowing))
    (text,) = add_files(hub, "url1")
    loader.load(text)
    assert loader.load(str(file)).adapter.content == "mine"
    assert new_loader().load(text).hit == "disk"
