"""What setup says where official files cannot be fetched, against the stand-in hub."""

import errno
import shutil
from dataclasses import replace

import pytest

from tests.support.official import obtain, wanted
from tests.support.services import HuggingFace
from weights import snapshot
from weights.manifest import REPOSITORIES
from weights.repository import PinnedRepository
from weights.serving.errors import (
    AccessDeniedError,
    DiskSpaceError,
    InvalidFileError,
    NotFoundError,
    SourceUnavailableError,
)

DEV, SCHNELL = REPOSITORIES["dev"], REPOSITORIES["schnell"]


def test_a_gated_model_names_the_token_and_the_page(hub, settings, huggingface):
    huggingface["dev"].token, huggingface["dev"].gated = "hf_mine", True
    with pytest.raises(AccessDeniedError, match=r"gated\. Accept .* HF_TOKEN \(none is set\)"):
        obtain(DEV, "main", settings)
    with pytest.raises(AccessDeniedError, match=r"HF_TOKEN \(one is set\)"):
        obtain(DEV, "main", replace(settings, token="hf_other"))
    obtain(DEV, "main", replace(settings, token="hf_mine"))
    assert {request.token for request in hub.seen("GET", "/cdn/")} == {None}


def test_a_gate_is_met_before_the_files_of_any_repository_are_fetched(hub, settings, huggingface):
    """Everybody may list a gated repository."""
    huggingface["schnell"].token, huggingface["schnell"].gated = "hf_mine", True
    both = [PinnedRepository(repository, "main") for repository in (DEV, SCHNELL)]
    with pytest.raises(AccessDeniedError, match=r"FLUX\.1-schnell.* is gated"):
        snapshot.obtain(both, settings)
    assert hub.count("GET", "/cdn/") == 0
    assert snapshot.obtain(both, replace(settings, token="hf_mine"))


@pytest.mark.parametrize("lost", ["all but one", "a shard"])
def test_a_part_of_a_snapshot_is_not_taken_for_the_whole(
    hub, settings, huggingface, official_files, lost
):
    """As other tools leave it that fetch single files: huggingface_hub has no list of all then."""
    commit = huggingface["dev"].branches["main"]
    folder = settings.cache_dir / "models--black-forest-labs--FLUX.1-dev"
    for name in wanted(official_files["dev"], "dev"):
        if name == "transformer/config.json" or (lost == "a shard" and "-00002-of" not in name):
            path = folder / "snapshots" / commit / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(official_files["dev"][name])
    huggingface["dev"].token, huggingface["dev"].gated = "hf_mine", True
    with pytest.raises(SourceUnavailableError):
        obtain(DEV, commit, replace(settings, endpoint="http://127.0.0.1:9"))
    with pytest.raises(AccessDeniedError, match="is gated"):
        obtain(DEV, commit, settings)
    assert len(list(obtain(DEV, commit, replace(settings, token="hf_mine")).rglob("*-00002-of*")))


def test_a_damaged_index_is_fetched_anew(settings, huggingface):
    """Left by another tool, or by a loss of power: there is no stamp that it was verified."""
    path = obtain(DEV, "main", settings)
    shutil.rmtree(path.parent.parent / "verified")
    index = next(path.glob("transformer/*.index.json"))
    index.resolve().write_text("")
    with pytest.raises(InvalidFileError, match="index"):
        obtain(DEV, "main", settings)
    assert obtain(DEV, "main", settings) == path
    assert index.read_text()


def test_a_token_that_may_not_read_gated_repositories_is_told_so(hub, settings, huggingface):
    """The Hub's 403 has no code of its own then."""
    hub.fail("/resolve/", 403, times=99)
    with pytest.raises(AccessDeniedError, match=r"HTTP 403.*read access .* gated repositories"):
        obtain(SCHNELL, "main", replace(settings, token="hf_fine_grained"))
    assert hub.count("HEAD", "/resolve/") == 1


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
