"""The official repositories through huggingface_hub's own client, against the stand-in hub."""

import logging
import os
import re
import shutil
import time
from dataclasses import replace

import pytest

from tests.support.official import obtain, wanted
from tests.support.services import sha256
from weights import snapshot
from weights.download.transfer import LogProgress
from weights.manifest import REPOSITORIES
from weights.repository import PinnedRepository
from weights.serving.errors import InvalidFileError, SourceUnavailableError
from weights.stamp import read_stamp, remove_stamp

DEV, SCHNELL = REPOSITORIES["dev"], REPOSITORIES["schnell"]
COMPVIS = REPOSITORIES["safety/compvis"]
SHARDS = 4
SHARD = "transformer/diffusion_pytorch_model-00002-of-00004.safetensors"
NOWHERE = "http://127.0.0.1:9"


def files(path):
    return {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}


def visible(path):
    """What the libraries read: not what huggingface_hub notes for itself."""
    return {name for name in files(path) if not name.startswith(".cache/")}


def asked_for(hub, repository):
    """The files of a repository that the hub was asked for."""
    return {
        request.path.partition("/resolve/")[2].partition("/")[2]
        for method in ("GET", "HEAD")
        for request in hub.seen(method, f"/{repository.name}/resolve/")
    }


# --- what is fetched


@pytest.mark.parametrize("part", REPOSITORIES)
def test_what_the_pipelines_need_is_fetched_and_nothing_else(
    hub, settings, huggingface, official_files, part
):
    path = obtain(REPOSITORIES[part], "main", settings)
    expected = wanted(official_files[part], part)
    assert files(path) == expected
    assert asked_for(hub, REPOSITORIES[part]) == expected
    assert all((path / n).read_bytes() == official_files[part][n] for n in expected)


def test_schnell_brings_no_second_copy_of_what_it_shares_with_dev(settings, huggingface):
    parts = {name.partition("/")[0] for name in files(obtain(SCHNELL, "main", settings))}
    assert parts == {"model_index.json", "scheduler", "transformer"}


def test_licence_size_and_progress_with_a_total_are_in_the_log(
    settings, huggingface, official_files, caplog, monkeypatch
):
    monkeypatch.setattr("weights.snapshot.LogProgress", lambda name: LogProgress(name, every=0))
    caplog.set_level(logging.INFO, "weights")
    obtain(DEV, "main", settings)
    names = wanted(official_files["dev"], "dev")
    size = sum(len(official_files["dev"][name]) for name in names)
    assert "FLUX.1-dev): licence: FLUX.1 [dev] Non-Commercial License" in caplog.text
    assert f"official files: {size / 1e6:.1f} of {size / 1e6:.1f} MB" in caplog.text
    assert f"{len(names)} files, {size / 1e9:.2f} GB to fetch" in caplog.text
    assert "complete and verified" in caplog.text


def test_the_progress_of_several_repositories_has_one_total(
    settings, huggingface, official_files, caplog, monkeypatch
):
    monkeypatch.setattr("weights.snapshot.LogProgress", lambda name: LogProgress(name, every=0))
    caplog.set_level(logging.INFO, "weights")
    snapshot.obtain([PinnedRepository(DEV, "main"), PinnedRepository(SCHNELL, "main")], settings)
    size = sum(
        len(official_files[part][name])
        for part in ("dev", "schnell")
        for name in wanted(official_files[part], part)
    )
    assert f"{size / 1e9:.2f} GB to fetch in all" in caplog.text
    steps = re.findall(r"official files: ([\d.]+) of ([\d.]+) MB", caplog.text)
    done = [float(step) for step, _ in steps]
    assert {total for _, total in steps} == {f"{size / 1e6:.1f}"}
    assert done == sorted(done)
    assert done[-1] == pytest.approx(size / 1e6, abs=0.06)


# --- pins


def test_the_default_revisions_are_those_of_the_manifest(
    settings, huggingface, official_files, monkeypatch
):
    for part in ("dev", "schnell", "safety/falconsai"):
        repository = REPOSITORIES[part]
        huggingface[part].commits[repository.revision] = official_files[part]
        path = obtain(repository, repository.revision, settings)
        assert path.name == repository.revision
        assert re.fullmatch("[0-9a-f]{40}", repository.revision)


def test_a_pull_request_is_pinned_by_the_hash_of_its_weights(
    hub, settings, huggingface, official_files
):
    commit = huggingface["safety/compvis"].commit(
        official_files["safety/compvis"], branch=COMPVIS.revision
    )
    with pytest.raises(
        InvalidFileError, match=r"refs/pr/41 .*revision was changed.*FLUX_REVISIONS=compvis="
    ):
        obtain(COMPVIS, COMPVIS.revision, settings)
    assert hub.count("GET", "/cdn/") == 0
    weights = official_files["safety/compvis"]["model.safetensors"]
    same = replace(COMPVIS, sha256={"model.safetensors": sha256(weights)})
    path = obtain(same, COMPVIS.revision, settings)
    assert path.name == commit
    assert obtain(same, COMPVIS.revision, replace(settings, endpoint=NOWHERE)) == path
    assert obtain(COMPVIS, commit, replace(settings, endpoint=NOWHERE)) == path


# --- a restart


def test_a_restart_asks_the_hub_for_nothing(hub, settings, huggingface, caplog):
    first = obtain(DEV, "main", settings)
    asked = len(hub.requests)
    assert obtain(DEV, "main", settings) == first
    assert obtain(DEV, "main", replace(settings, endpoint=NOWHERE)) == first
    assert len(hub.requests) == asked


def test_weights_stay_what_they_were_until_they_are_fetched_anew(
    settings, huggingface, official_files
):
    first = obtain(SCHNELL, "main", settings)
    old = huggingface["schnell"].branches["main"]
    changed = official_files["schnell"] | {"scheduler/scheduler_config.json": b"{}"}
    new = huggingface["schnell"].commit(changed)
    assert obtain(SCHNELL, "main", settings) == first
    snapshot.fetch_snapshots([PinnedRepository(SCHNELL, "main")], settings)
    assert obtain(SCHNELL, "main", settings).name == new
    assert obtain(SCHNELL, old, settings) == first


@pytest.fixture
def other_layout(huggingface, official_files):
    """A newer commit of schnell, whose transformer is one file."""
    content = official_files["schnell"]
    kept = {name: text for name, text in content.items() if not name.startswith("transformer/d")}
    single = {"transformer/diffusion_pytorch_model.safetensors": content[SHARD]}
    return huggingface["schnell"].commit(kept | single)


def test_a_directory_holds_the_files_of_one_revision(settings, huggingface, other_layout, tmp_path):
    there, anew = (PinnedRepository(SCHNELL, "main", tmp_path / name) for name in "ab")
    old = next(commit for commit in huggingface["schnell"].commits if commit != other_layout)
    snapshot.fetch_snapshots([replace(there, revision=old)], settings)
    own = there.directory / "transformer" / "mine.safetensors"
    own.write_text("of somebody")
    snapshot.fetch_snapshots([there, anew], settings)
    own.unlink()
    assert read_stamp(there.directory, SCHNELL).commit == other_layout
    assert read_stamp(there.directory, replace(SCHNELL, files=SCHNELL.files[1:])) is None
    assert visible(there.directory) == visible(anew.directory)
    remove_stamp(there.directory)  # as if it had broken off at its end
    before = [replace(there, revision=old), PinnedRepository(SCHNELL, old, tmp_path / "c")]
    snapshot.fetch_snapshots(before, settings)
    assert visible(there.directory) == visible(tmp_path / "c")


def test_an_update_that_breaks_off_leaves_no_mark_of_the_revision_before(
    hub, settings, huggingface, other_layout, tmp_path
):
    there = PinnedRepository(SCHNELL, "main", tmp_path / "a")
    old = next(commit for commit in huggingface["schnell"].commits if commit != other_layout)
    snapshot.fetch_snapshots([replace(there, revision=old)], settings)
    hub.fail("/cdn/", 503, times=20)
    with pytest.raises(SourceUnavailableError):
        snapshot.fetch_snapshots([there], settings)
    assert read_stamp(there.directory, SCHNELL) is None


def test_files_that_something_else_put_there_are_verified_or_named_unverified(
    hub, settings, huggingface, caplog
):
    path = obtain(SCHNELL, "main", settings)
    shutil.rmtree(path.parent.parent / "verified")
    assert obtain(SCHNELL, "main", replace(settings, endpoint=NOWHERE)) == path
    assert "Using the files from before, which were not verified" in caplog.text
    hub.fail("/api/models/", 404)  # as of a repository that was deleted, or made private
    assert obtain(SCHNELL, "main", settings) == path
    assert caplog.text.count("which were not verified") == 2
    fetched = hub.count("GET", "/cdn/")
    (path / SHARD).resolve().write_bytes(b"damaged on the disk")
    with pytest.raises(InvalidFileError, match=SHARD):
        obtain(SCHNELL, "main", settings)
    assert obtain(SCHNELL, "main", settings) == path
    assert hub.count("GET", "/cdn/") == fetched + 1


# --- interruptions


def test_a_broken_connection_goes_on_where_it_stopped(hub, settings, huggingface, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 10_000)
    hub.cut("/cdn/", after=70_000)
    obtain(SCHNELL, "main", settings)
    ranges = [r.headers["range"] for r in hub.seen("GET", "/cdn/") if "range" in r.headers]
    assert ranges == ["bytes=70000-"]


def test_a_failed_start_keeps_the_files_that_are_whole(hub, settings, huggingface, official_files):
    hub.fail(f"/{SHARD}", 404, times=99)
    with pytest.raises(SourceUnavailableError):
        obtain(SCHNELL, "main", settings)
    with pytest.raises(SourceUnavailableError, match=r"cannot be reached.*script/download"):
        obtain(SCHNELL, "main", replace(settings, endpoint=NOWHERE))
    hub.heal()
    hub.requests.clear()
    path = obtain(SCHNELL, "main", settings)
    assert files(path) == wanted(official_files["schnell"], "schnell")
    assert SHARD in asked_for(hub, SCHNELL)
    assert hub.count("GET", "/cdn/") < SHARDS


def test_what_a_killed_download_has_left_is_removed(settings, huggingface):
    path = obtain(SCHNELL, "main", settings)
    blobs = path.parents[1] / "blobs"
    for name, age in (("old", 7200), ("of another process", 60)):
        part = blobs / f"{name}.incomplete"
        part.touch()
        os.utime(part, (time.time() - age,) * 2)
    (path / SHARD).resolve().unlink()
    (path / SHARD).unlink()
    assert obtain(SCHNELL, "main", settings)
    assert [part.name for part in blobs.glob("*.incomplete")] == ["of another process.incomplete"]


@pytest.mark.parametrize("name", [SHARD, "transformer/config.json"])
def test_a_wrong_hash_is_refused_and_fetched_anew(hub, settings, huggingface, name):
    huggingface["schnell"].damaged.add(name)
    with pytest.raises(InvalidFileError, match=rf"{name} is not the file .* start again"):
        obtain(SCHNELL, "main", settings)
    huggingface["schnell"].damaged.clear()
    hub.requests.clear()
    obtain(SCHNELL, "main", settings)
    assert asked_for(hub, SCHNELL) == {name}
