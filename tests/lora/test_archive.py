"""Archives from strangers."""

import gzip
import io
import tarfile

import pytest

from lora.archive import kind_of, take_weights
from tests.lora.files import safetensors
from tests.support.services import tar, trained_on_replicate
from weights.serving.errors import InvalidFileError

WEIGHTS = safetensors("x")


@pytest.fixture
def take(tmp_path):
    def run(content, max_bytes=1 << 20):
        archive, target = tmp_path / "archive", tmp_path / "target"
        archive.write_bytes(content)
        assert kind_of(archive, "a.tar") == "tar"
        words, _ = take_weights(archive, target, "a.tar", max_bytes, lambda: None)
        return target.read_bytes(), words

    return run


def special(*members):
    """A tar of members that are not plain files: (name, type, link target, size)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, kind, link in members:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, link
            archive.addfile(member)
    return buffer.getvalue()


@pytest.mark.parametrize("compression", ["", "gz"])
def test_weights_and_trigger_word_of_a_trainer(take, compression):
    content = tar(trained_on_replicate(WEIGHTS, trigger="ohwx"), compression)
    assert take(content) == (WEIGHTS, ("ohwx",))


@pytest.mark.parametrize(
    ("beside", "words"),
    [
        ({}, ()),
        ({"config.yaml": b'  trigger_word: "p3rs0n"  # mine\n'}, ("p3rs0n",)),
        ({"config.yaml": b"- trigger_word: null\n"}, ()),
        ({"job.json": b'{"config": {"steps": 1,\n "trigger_word": "my dog"}}'}, ("my dog",)),
        ({"job.json": b" " * (1 << 16) + b'"trigger_word": "my dog"'}, ()),  # too large for one
        ({"config.yaml": b"\xff\xfe\ntrigger_word: TOK"}, ("TOK",)),
    ],
)
def test_trigger_words_beside_the_weights(take, beside, words):
    assert take(tar({"lora.safetensors": WEIGHTS, **beside})) == (WEIGHTS, words)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], "holds none"),
        (["notes.txt"], "holds none"),
        (["a.safetensors", "b/b.safetensors"], r"a\.safetensors, b/b\.safetensors"),
    ],
)
def test_not_exactly_one_is_refused(take, tmp_path, names, said):
    with pytest.raises(InvalidFileError, match=said):
        take(tar(dict.fromkeys(names, WEIGHTS)) if names else tar({"dir/x": b""}))
    assert not (tmp_path / "target").exists()


def test_resource_forks_of_a_mac_do_not_count(take):
    assert take(tar({"._lora.safetensors": b"fork", "lora.safetensors": WEIGHTS}))[0] == WEIGHTS


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_no_weights(take, kind):
    with pytest.raises(InvalidFileError, match="holds none"):
        take(special(("lora.safetensors", kind, "/etc/passwd")))


def test_names_that_lead_outside_write_nothing_outside(take, tmp_path):
    content = tar({"../../outside.safetensors": WEIGHTS, "/tmp/outside.txt": b"x"})
    assert take(content)[0] == WEIGHTS
    assert sorted(path.name for path in tmp_path.iterdir()) == ["archive", "target"]
    assert not (tmp_path.parent.parent / "outside.safetensors").exists()


def test_bomb_is_refused(take, tmp_path):
    bomb = tar({"zeros.bin": b"\0" * (8 << 20), "lora.safetensors": WEIGHTS}, "gz")
    assert len(bomb) < 20_000
    with pytest.raises(InvalidFileError, match=r"a\.tar: the tar holds more than"):
        take(bomb)
    assert not (tmp_path / "target").exists()


def test_too_many_members_are_refused(take):
    with pytest.raises(InvalidFileError, match="more than 10000 files"):
        take(tar({f"{number}": b"" for number in range(10_001)}, "gz"))


def test_extended_header_of_absurd_size_is_refused_without_reading_it(take):
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 1 << 33
    content = header.tobuf(tarfile.GNU_FORMAT) + b"\0" * 1024
    with pytest.raises(InvalidFileError, match=r"extended header of [0-9]+ bytes; at most 1048576"):
        take(gzip.compress(content))


@pytest.mark.parametrize("compression", ["", "gz"])
def test_damaged_archive_is_refused(take, compression):
    content = tar({"lora.safetensors": safetensors("x", 50_000)}, compression)
    with pytest.raises(InvalidFileError, match="damaged"):
        take(content[: len(content) // 2])


class CancelledError(Exception):
    pass


def test_a_cancel_leaves_nothing_of_an_archive(tmp_path):
    archive, target = tmp_path / "archive", tmp_path / "target"
    archive.write_bytes(tar({"a.safetensors": WEIGHTS, "b.txt": b"caption"}))

    def check() -> None:
        if target.exists():
            raise CancelledError

    with pytest.raises(CancelledError):
        take_weights(archive, target, "a.tar", 1 << 20, check)
    assert not target.exists()
