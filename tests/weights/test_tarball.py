"""A checkpoint from a URL of the operator's own."""

import errno
import hashlib
import io
import logging
import re
import tarfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.services import tar
from weights.download.retry import RetryPolicy
from weights.serving.errors import DiskSpaceError, InvalidFileError, NotFoundError
from weights.tarball import unpacked

FILES = {"dev/model_index.json": b"{}", "schnell/model_index.json": b"{}", "dev/big": b"x" * 90_000}
QUICK = RetryPolicy(2, backoff=0.01)


def contents(directory):
    paths = [p for p in directory.rglob("*") if p.is_file()]
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in paths}


def test_a_tar_is_fetched_unpacked_and_kept(hub, tmp_path):
    url = hub.add_file("/store/flux.tar", tar(FILES)) + "?signature=secret"
    directory = unpacked(url, tmp_path, QUICK)
    assert contents(directory) == FILES
    asked = len(hub.requests)
    assert unpacked(url, tmp_path, QUICK) == directory
    assert len(hub.requests) == asked
    assert not list(tmp_path.glob("*.tar*"))


def test_a_tar_of_a_directory(hub, tmp_path):
    url = hub.add_file("/store/flux.tar", tar({f"flux/{n}": c for n, c in FILES.items()}))
    assert contents(unpacked(url, tmp_path, QUICK)) == FILES


def test_the_hash_in_the_url_is_checked(hub, tmp_path):
    content = tar(FILES)
    url = hub.add_file("/store/flux.tar", content)
    with pytest.raises(InvalidFileError, match="announces 000"):
        unpacked(f"{url}#sha256={'0' * 64}", tmp_path, QUICK)
    digest = hashlib.sha256(content).hexdigest()
    for spelling in (digest, digest.upper()):
        assert contents(unpacked(f"{url}#sha256={spelling}", tmp_path, QUICK)) == FILES


def test_a_broken_connection_goes_on_where_it_stopped(hub, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    content = tar(FILES)
    url = hub.add_file("/store/flux.tar", content)
    hub.cut("/store/flux.tar", after=60_000, times=3)  # the probe takes the first
    assert contents(unpacked(url, tmp_path, RetryPolicy(4, backoff=0.01))) == FILES
    assert [r.headers["range"] for r in hub.requests if "range" in r.headers]
    assert f"{len(content) / 1e9:.2f} GB to fetch" in caplog.text


def test_what_is_no_tar_is_refused_and_not_kept(hub, tmp_path):
    url = hub.add_file("/store/flux.tar", b"<html>sign in</html>")
    with pytest.raises(InvalidFileError, match="not a tar, or it is damaged"):
        unpacked(url, tmp_path, QUICK)
    hub.add_file("/store/flux.tar", tar(FILES))
    assert contents(unpacked(url, tmp_path, QUICK)) == FILES


def damaged(how: str) -> bytes:
    """A tar of FILES in which the second header, or what comes after it, is not as it was."""
    whole = bytearray(tar(FILES, "gz" if how == "checksum" else ""))
    if how == "checksum":
        whole[-5] ^= 1
        return bytes(whole)
    second = 512 + -(-len(next(iter(FILES.values()))) // 512) * 512
    if how == "flipped":
        whole[second + 10] ^= 1
        return bytes(whole)
    return bytes(whole[: second + (0 if how == "cut before" else 100)])


@pytest.mark.parametrize("how", ["flipped", "cut before", "cut within", "checksum"])
def test_a_damaged_tar_is_refused_and_fetched_anew(hub, tmp_path, how):
    url = hub.add_file("/store/flux.tar", damaged(how))
    with pytest.raises(InvalidFileError, match="not a tar, or it is damaged"):
        unpacked(url, tmp_path, QUICK)
    hub.add_file("/store/flux.tar", tar(FILES))
    assert contents(unpacked(url, tmp_path, QUICK)) == FILES


def links(*members: tuple[str, bytes, str]) -> bytes:
    """A tar with FILES, then members of (name, tarfile type, link target)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in FILES.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for name, kind, target in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            archive.addfile(info)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "kind", "target"),
    [
        ("../outside", tarfile.REGTYPE, ""),
        ("dev/../../outside", tarfile.REGTYPE, ""),
        ("{tmp}/outside", tarfile.REGTYPE, ""),
        ("dev/link", tarfile.SYMTYPE, "{tmp}/secret"),
        ("dev/link", tarfile.SYMTYPE, "../../secret"),
        ("dev/link", tarfile.LNKTYPE, "{tmp}/secret"),
        ("dev/link", tarfile.SYMTYPE, "link"),
        ("dev/directory", tarfile.SYMTYPE, ".."),
        ("dev/pipe", tarfile.FIFOTYPE, ""),
        ("dev/device", tarfile.CHRTYPE, ""),
        ("dev/big", tarfile.DIRTYPE, ""),
        ("dev/big/inside", tarfile.REGTYPE, ""),
        ("dev", tarfile.REGTYPE, ""),
    ],
)
def test_a_hostile_member_is_refused_by_name(hub, tmp_path, name, kind, target):
    (tmp_path / "secret").write_text("x")
    name, target = (text.format(tmp=tmp_path) for text in (name, target))
    url = hub.add_file("/store/flux.tar", links((name, kind, target)))
    with pytest.raises(InvalidFileError, match=re.escape(repr(name))):
        unpacked(url, tmp_path / "store", QUICK)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["secret", "store"]
    assert not [path for path in (tmp_path / "store").iterdir() if path.suffix != ".lock"]


def test_a_name_with_a_nul_byte_is_refused(hub, tmp_path):
    """Only an extended header can carry one: a plain header's name ends there."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("dev/name")
        member.pax_headers = {"path": "dev/na\0me"}
        archive.addfile(member)
    url = hub.add_file("/store/flux.tar", buffer.getvalue())
    with pytest.raises(InvalidFileError, match=r"'dev/na\\x00me' is no name of a file"):
        unpacked(url, tmp_path, QUICK)
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]


@pytest.mark.parametrize(
    ("kind", "target"), [(tarfile.LNKTYPE, "dev/big"), (tarfile.SYMTYPE, "../dev/big")]
)
def test_a_link_to_a_file_of_the_archive_is_that_file(hub, tmp_path, kind, target):
    url = hub.add_file("/store/flux.tar", links(("schnell/big", kind, target)))
    directory = unpacked(url, tmp_path, QUICK)
    assert contents(directory) == FILES | {"schnell/big": FILES["dev/big"]}
    assert not any(path.is_symlink() for path in directory.rglob("*"))


def test_a_missing_tar_is_named_without_its_secret(hub, tmp_path):
    with pytest.raises(NotFoundError, match=r"/store/absent\.tar") as caught:
        unpacked(f"{hub.url}/store/absent.tar?signature=secret", tmp_path, QUICK)
    assert "secret" not in str(caught.value)


def test_a_full_disk_names_the_setting(hub, tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    url = hub.add_file("/store/flux.tar", tar(FILES))
    monkeypatch.setattr("weights.tarball.shutil.copyfileobj", full)
    with pytest.raises(DiskSpaceError, match="FLUX_CACHE_DIRECTORY"):
        unpacked(url, tmp_path, QUICK)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_two_starts_at_once_fetch_it_once(hub, tmp_path):
    url = hub.add_file("/store/flux.tar", tar(FILES))
    hub.drip("/store/flux.tar", size=20_000, seconds=0.03, times=4)
    with ThreadPoolExecutor(2) as starts:
        one, other = starts.map(lambda _: unpacked(url, tmp_path, QUICK), range(2))
    assert one == other
    assert contents(one) == FILES
    assert len(hub.requests) == 2  # the first asks what there is


def test_an_unpacking_that_was_cut_short_is_begun_anew(hub, tmp_path, monkeypatch):
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    url = hub.add_file("/store/flux.tar", tar(FILES))
    with monkeypatch.context() as patch:
        patch.setattr("weights.tarball.shutil.copyfileobj", killed)
        with pytest.raises(KeyboardInterrupt):
            unpacked(url, tmp_path, QUICK)
    assert [path for path in tmp_path.iterdir() if path.is_dir()]
    assert contents(unpacked(url, tmp_path, QUICK)) == FILES
