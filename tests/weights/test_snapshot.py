"""The official repositories through huggingface_hub's own client, against the stand-in hub."""

import errno
import logging
import re
import shutil
from dataclasses import replace

import pytest
from huggingface_hub.utils import close_session

from tests.support.official import wanted
from tests.support.services import HuggingFace, sha256
from weights import snapshot
from weights.download.retry import RetryPolicy
from weights.download.transfer import LogProgress
from weights.manifest import REPOSITORIES
from weights.repository import HubSettings, PinnedRepository
from weights.serving.errors import (
    AccessDeniedError,
    DiskSpaceError,
    InvalidFileError,
    NotFoundError,
    SourceUnavailableError,
)

DEV, SCHNELL = REPOSITORIES["dev"], REPOSITORIES["schnell"]
COMPVIS = REPOSITORIES["safety/compvis"]
SHARDS = 4
SHARD = "transformer/diffusion_pytorch_model-00002-of-00004.safetensors"
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def settings(hub, tmp_path):
    yield HubSettings(hub.url, cache_dir=tmp_path / "hf", retry=RetryPolicy(2, backoff=0.01))
    close_session()


@pytest.fixture
def huggingface(hub, official_files):
    """The hub with the four repositories, by their part."""
    huggingface = HuggingFace(hub)
    return {part: huggingface.add(r.name, official_files[part]) for part, r in REPOSITORIES.items()}


def obtain(repository, revision, settings):
    (path,) = snapshot.obtain([PinnedRepository(repository, revision)], settings)
    return path


def files(path):
    return {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}


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


def test_files_that_something_else_put_there_are_verified_or_named_unverified(
    hub, settings, huggingface, caplog
):
    path = obtain(SCHNELL, "main", settings)
    shutil.rmtree(path.parent.parent / "verified")
    assert obtain(SCHNELL, "main", replace(settings, endpoint=NOWHERE)) == path
    assert "Using the files from before, which were not verified" in caplog.text
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


@pytest.mark.parametrize("name", [SHARD, "transformer/config.json"])
def test_a_wrong_hash_is_refused_and_fetched_anew(hub, settings, huggingface, name):
    huggingface["schnell"].damaged.add(name)
    with pytest.raises(InvalidFileError, match=rf"{name} is not the file .* start again"):
        obtain(SCHNELL, "main", settings)
    huggingface["schnell"].damaged.clear()
    hub.requests.clear()
    obtain(SCHNELL, "main", settings)
    assert asked_for(hub, SCHNELL) == {name}


# --- refusals


def test_a_gated_model_names_the_token_and_the_page(hub, settings, huggingface):
    huggingface["dev"].token, huggingface["dev"].gated = "hf_mine", True
    with pytest.raises(AccessDeniedError, match=r"gated\. Accept .* HF_TOKEN \(none is set\)"):
        obtain(DEV, "main", settings)
    with pytest.raises(AccessDeniedError, match=r"HF_TOKEN \(one is set\)"):
        obtain(DEV, "main", replace(settings, token="hf_other"))
    obtain(DEV, "main", replace(settings, token="hf_mine"))
    assert {request.token for request in hub.seen("GET", "/cdn/")} == {None}


def test_an_unknown_revision_names_its_setting(settings, huggingface):
    with pytest.raises(NotFoundError, match=r"at v9 \(dev in FLUX_REVISIONS\): no such branch"):
        obtain(DEV, "v9", settings)


def test_an_unknown_repository(settings, hub):
    HuggingFace(hub)
    with pytest.raises(NotFoundError, match=r"FLUX\.1-dev .*no such repository, or it is private"):
        obtain(DEV, "main", settings)


def test_a_revision_without_safetensors_names_its_setting(settings, huggingface, official_files):
    part = "safety/compvis"
    left = {k: v for k, v in official_files[part].items() if k != "model.safetensors"}
    huggingface[part].commit(left, branch="old")
    with pytest.raises(NotFoundError, match=r"no model\.safetensors.*FLUX_REVISIONS=compvis="):
        obtain(REPOSITORIES[part], "old", settings)
    assert obtain(REPOSITORIES[part], "main", settings)


@pytest.mark.parametrize("status", [500, 503])
def test_a_hub_that_is_down_is_asked_again(hub, settings, huggingface, status):
    hub.fail("/api/models/", status)
    assert obtain(SCHNELL, "main", settings)


def test_a_full_disk_is_noticed_before_anything_is_fetched(hub, settings, huggingface, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr("weights.snapshot.shutil.disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(DiskSpaceError, match=r"no room for .* GB .* in .*/hf.* HF_HOME"):
        obtain(DEV, "main", settings)
    assert hub.count("GET", "/cdn/") == 0


def test_a_disk_with_room_for_one_of_two_is_noticed_before_anything_is_fetched(
    hub, settings, huggingface, official_files, monkeypatch
):
    both = [PinnedRepository(SCHNELL, "main"), PinnedRepository(DEV, "main")]
    sizes = [
        sum(len(official_files[part][name]) for name in wanted(official_files[part], part))
        for part in ("schnell", "dev")
    ]
    free = shutil.disk_usage("/")._replace(free=max(sizes) + min(sizes) // 2)
    monkeypatch.setattr("weights.snapshot.shutil.disk_usage", lambda _: free)
    with pytest.raises(DiskSpaceError, match=r"FLUX\.1-schnell at main.*FLUX\.1-dev at main.*room"):
        snapshot.obtain(both, settings)
    assert hub.count("GET", "/cdn/") == 0
    obtain(SCHNELL, "main", settings)
    assert snapshot.obtain(both, settings)  # what is there already takes no more room


def test_a_disk_that_fills_up_on_the_way(settings, huggingface, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("weights.snapshot.cached", lambda *_: None)
    monkeypatch.setattr("weights.repository.snapshot_download", full)
    with pytest.raises(DiskSpaceError, match="HF_HOME"):
        obtain(DEV, "main", settings)
