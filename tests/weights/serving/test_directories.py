"""Directories that settings name."""

import errno
from pathlib import Path

import pytest

from weights.serving.directories import is_full, usable
from weights.serving.errors import DirectoryError


def test_a_directory_is_made(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert usable(Path("~/a/b"), "SETTING") == tmp_path / "a" / "b"
    assert list((tmp_path / "a" / "b").iterdir()) == []


@pytest.mark.parametrize(
    ("path", "reason"),
    [("/dev/null/cache", "Not a directory"), ("/proc/cache", "No such file or directory")],
)
def test_one_that_cannot_be_made_is_named_with_its_setting(path: str, reason: str) -> None:
    with pytest.raises(DirectoryError) as caught:
        usable(Path(path), "SETTING")
    assert str(caught.value) == (
        f"{path}: this directory cannot be written ({reason}); set SETTING to one that can"
    )


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_is_full_also_when_the_users_share_of_it_is(code: int) -> None:
    assert is_full(OSError(code, "no room"))
    assert not is_full(OSError(errno.EACCES, "no permission"))


def test_without_a_home_directory(monkeypatch) -> None:
    def unknown(_: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", unknown)  # as for a user id that has no name
    with pytest.raises(DirectoryError, match=r"~/cache: .*Could not determine home.* set SETTING"):
        usable(Path("~/cache"), "SETTING")
