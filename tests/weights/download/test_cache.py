"""Files on disk: found, shared, evicted, and never half there."""

import multiprocessing
import os
import resource
import shutil
import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.services import sha256
from weights.download.cache import CacheSettings, FileCache
from weights.download.record import CacheRecord
from weights.serving.errors import DiskSpaceError, InvalidFileError

DAY = 24 * 3600


def add(cache: FileCache, key: str, content: bytes, age: float = 0.0) -> CacheRecord:
    """Put a file into the cache as a finished download."""
    digest = sha256(content)
    with cache.fetching(key) as target:
        target.write_bytes(content)
        path = cache.adopt(target, digest)
    record = CacheRecord(digest, len(content), path, "source", "revision", ("TOK",))
    cache.remember(key, record)
    with cache.in_use(record) as file:
        mark = file.parent.parent / "uses" / digest
    os.utime(mark, (time.time() - age,) * 2)
    return record


@pytest.fixture
def make(tmp_path):
    def new(max_bytes=10_000, min_free_bytes=0, **options):
        return FileCache(CacheSettings(tmp_path / "cache", max_bytes, min_free_bytes), **options)

    return new


def test_record_survives_a_restart(make):
    record = add(make(), "key", b"x" * 10)
    assert make().find("key") == record
    assert make().find("other key") is None


def test_directory_that_is_removed_is_made_again(make, tmp_path):
    cache = make()
    add(cache, "key", b"x" * 10)
    shutil.rmtree(tmp_path / "cache")
    assert cache.find("key") is None
    assert cache.find("key") is None
    record = add(cache, "key", b"x" * 10)
    assert cache.find("key") == record


def test_same_content_is_kept_once(make, tmp_path):
    cache = make()
    assert add(cache, "one", b"same").path == add(cache, "two", b"same").path
    assert len(list((tmp_path / "cache" / "objects").iterdir())) == 1


def test_truncated_or_missing_file_is_no_hit(make, tmp_path):
    cache = make()
    record = add(cache, "key", b"x" * 10)
    file = tmp_path / "cache" / record.path
    file.write_bytes(b"x" * 9)
    assert cache.find("key") is None
    file.unlink()
    assert cache.find("key") is None


def test_unfinished_download_is_no_hit_and_is_continued(make):
    cache = make()
    with cache.fetching("key") as target:
        target.with_name(target.name + ".part").write_bytes(b"half")
    assert cache.find("key") is None
    with make().fetching("key") as target:
        assert target.with_name(target.name + ".part").read_bytes() == b"half"


def test_damaged_record_is_no_hit(make, tmp_path):
    cache = make()
    add(cache, "key", b"x")
    (entry,) = (tmp_path / "cache" / "records").iterdir()
    entry.write_text('{"sha256": 1')
    assert cache.find("key") is None


def test_record_that_cannot_be_written_to_its_end_leaves_the_one_from_before(make, tmp_path):
    cache, before = make(), resource.getrlimit(resource.RLIMIT_FSIZE)
    record = add(cache, "key", b"x")
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            cache.remember("key", replace(record, source="x" * 2_000_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert cache.find("key") == record
    assert list((tmp_path / "cache" / "records").glob("*.draft")) == []


def test_least_recently_used_leaves_first(make):
    cache = make(max_bytes=25)
    for age, key in enumerate(["newest", "middle", "oldest"]):
        add(cache, key, key.encode().ljust(10), age * 60)
    cache.make_room(5)
    assert [cache.find(key) is not None for key in ("newest", "middle", "oldest")] == [1, 1, 0]
    with cache.in_use(cache.find("middle")):
        pass
    cache.make_room(10)
    assert [cache.find(key) is not None for key in ("newest", "middle")] == [0, 1]


def test_file_in_use_is_not_evicted(make):
    cache = make(max_bytes=10)
    record = add(cache, "key", b"x" * 10)
    with cache.in_use(record) as file:
        make(max_bytes=10).make_room(10)
        assert file.read_bytes() == b"x" * 10
    cache.make_room(10)
    assert cache.find("key") is None
    with pytest.raises(FileNotFoundError), cache.in_use(record):
        pass


Usage = namedtuple("Usage", "total used free")


def test_floor_of_free_space_evicts_and_then_refuses(make, monkeypatch):
    cache = make(max_bytes=1000, min_free_bytes=100)
    add(cache, "key", b"x" * 10)
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(1000, 900, 100))
    cache.make_room(0)
    assert cache.find("key") is not None
    with pytest.raises(DiskSpaceError, match="No room"):
        cache.make_room(1)
    assert cache.find("key") is None


def test_nothing_is_left_of_a_download_that_turned_out_to_be_no_adapter(make):
    def fetch():
        with make().fetching("key") as target:
            target.with_name(target.name + ".part").write_bytes(b"x")
            parts.extend(target.parent.iterdir())
            raise InvalidFileError("too large")

    parts = []
    with pytest.raises(InvalidFileError):
        fetch()
    assert [part.exists() for part in parts] == [False]


def test_broken_downloads_go_before_files_where_the_disk_is_full(make, monkeypatch):
    """The oldest first, but for those that somebody goes on with."""
    cache = make()
    add(cache, "key", b"x" * 10)
    parts = {}
    for age, key in enumerate(("new", "old", "older")):
        with cache.fetching(key) as target:
            parts[key] = target.with_name(target.name + ".part")
            parts[key].write_bytes(b"x" * 10)
            os.utime(parts[key], (time.time() - 60 * age,) * 2)

    def usage(_):
        there = sum(part.exists() for part in parts.values())
        return Usage(100, 10 * there, 100 - 10 * there)

    monkeypatch.setattr("shutil.disk_usage", usage)
    with cache.fetching("older"):
        cache.make_room(80)
    assert [key for key, part in parts.items() if part.exists()] == ["new", "older"]
    assert cache.find("key") is not None


def test_file_kept_elsewhere_is_removed_by_its_owner_if_at_all(make, tmp_path):
    removed = []
    cache = make(max_bytes=0, remove_external=removed.append)
    for name, evictable in (("ours", True), ("theirs", False)):
        file = tmp_path / name
        file.write_bytes(name.encode())
        size = len(name)
        cache.remember(name, CacheRecord(name, size, str(file), "s", "r", evictable=evictable))
    cache.make_room(0)
    assert removed == [tmp_path / "ours"]
    assert cache.find("ours") is None
    assert cache.find("theirs") is not None


def test_file_kept_elsewhere_is_ours_by_whichever_name_we_fetched_it(make, tmp_path):
    removed = []
    cache = make(max_bytes=0, remove_external=removed.append)
    file = tmp_path / "file"
    file.write_bytes(b"x")
    for name, evictable in (("first", False), ("fetched", True), ("found again", False)):
        cache.remember(name, CacheRecord("x", 1, str(file), "s", "r", evictable=evictable))
    cache.make_room(0)
    assert removed == [file]


def test_brief_records_go_after_a_day(make, tmp_path):
    cache = make()
    record = add(cache, "pin", b"x")
    for key, lasting in (("new", False), ("old", False), ("lasting", True)):
        before = set((tmp_path / "cache" / "records").iterdir())
        cache.remember(key, replace(record, lasting=lasting))
        (entry,) = set((tmp_path / "cache" / "records").iterdir()) - before
        age = 0 if key == "new" else 2 * DAY
        os.utime(entry, (time.time() - age,) * 2)
    cache.make_room(0)
    assert [key for key in ("pin", "new", "old", "lasting") if cache.find(key)] == [
        "pin", "new", "lasting",
    ]  # fmt: skip


def test_leftovers_of_a_crash_go_after_a_day(make, tmp_path):
    cache = make()
    for folder in ("parts", "objects"):
        for name, age in (("old", 2 * DAY), ("new", 0)):
            file = tmp_path / "cache" / folder / name
            file.touch()
            os.utime(file, (time.time() - age,) * 2)
        cache.make_room(0)
        assert [p.name for p in (tmp_path / "cache" / folder).iterdir()] == ["new"]


def test_no_file_is_left_of_what_was_fetched_once(make, tmp_path):
    cache = make()
    add(cache, "key", b"x")
    for path in (tmp_path / "cache").rglob("*"):
        os.utime(path, (time.time() - 2 * DAY,) * 2)
    for path in (tmp_path / "cache" / "records").iterdir():
        path.unlink()
    cache.make_room(0)
    files = [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert files == ["books.lock"]  # held meanwhile


def test_a_download_under_way_keeps_its_lock_however_old(make, tmp_path):
    with make().fetching("key"):
        (lock,) = (tmp_path / "cache" / "locks").iterdir()
        os.utime(lock, (time.time() - 2 * DAY,) * 2)
        make().make_room(0)
        tries = []

        def cancel():
            tries.append(len(tries))
            if len(tries) > 1:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt), make().fetching("key", cancel):
            pass


def test_wait_for_another_download_can_be_cancelled(make):
    cache = make()

    def cancel():
        raise KeyboardInterrupt

    with cache.fetching("key"), pytest.raises(KeyboardInterrupt), make().fetching("key", cancel):
        pass


def _hold(root: Path, in_use, release) -> None:
    cache = FileCache(CacheSettings(root))
    with cache.in_use(cache.find("key")):
        in_use.set()
        release.wait(10)


def test_file_in_use_by_another_process_is_not_evicted(make, tmp_path):
    cache = make(max_bytes=10)
    add(cache, "key", b"x" * 10)
    context = multiprocessing.get_context("spawn")
    in_use, release = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(tmp_path / "cache", in_use, release))
    process.start()
    assert in_use.wait(30)
    cache.make_room(10)
    assert cache.find("key") is not None
    release.set()
    process.join()
    process.close()
    cache.make_room(10)
    assert cache.find("key") is None
