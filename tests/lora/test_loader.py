"""The cached loader: what is kept, what is logged, and what failures leave behind."""

import itertools
import multiprocessing
import subprocess
import sys
import threading
import time
from contextlib import closing
from dataclasses import replace

import pytest

from lora.formats.errors import AdapterError
from lora.loader import AdapterLoader
from lora.settings import LoaderSettings
from tests.lora.files import add_files, parse, safetensors
from tests.support.services import tar, trained_on_replicate
from weights.download.cache import FileCache
from weights.serving.errors import InvalidFileError, SourceUnavailableError
from weights.serving.settings import Settings

VERSION = "0a" * 32


class CountingParser:
    """Counts how often each file is parsed."""

    def __init__(self):
        self.parsed = []

    def __call__(self, path, digest, settings):
        adapter = parse(path, digest, settings)
        self.parsed.append(adapter.content)
        return adapter


def test_one_line_tells_everything(loader, replicate):
    replicate.add("fofr/flux-x", trained_on_replicate(safetensors("x", 1_000_000)), VERSION)
    first, second = (loader.load(f"fofr/flux-x:{VERSION}").describe() for _ in range(2))
    assert first == (
        f"replicate.com/fofr/flux-x:{VERSION}, revision {VERSION[:12]}, 1.0 MB, "
        "format test, 1 modules, 1 keys ignored (bundle_emb.x), from download, trigger words: TOK"
    )
    assert second == first.replace("from download", "from memory")


def test_switching_between_a_handful_parses_each_once(hub, new_loader):
    parser = CountingParser()
    loader = new_loader(parse=parser)
    first, second = add_files(hub, "first", "second")
    for text in (first, second, first, second):
        loader.load(text)
    assert parser.parsed == ["first", "second"]


def test_memory_keeps_the_recently_used_within_its_budget(hub, new_loader, settings):
    parser = CountingParser()
    texts = add_files(hub, "a", "b", "c")
    room_for_two = 2 * len(safetensors("a"))
    loader = new_loader(replace(settings, memory_bytes=room_for_two), parser)
    a, b, c = texts
    hits = [loader.load(text).hit for text in (a, b, a, c, a, b)]
    assert hits == ["download", "download", "memory", "download", "memory", "disk"]
    assert parser.parsed == ["a", "b", "c", "b"]


def test_adapter_larger_than_the_memory_budget_loads_and_costs_no_other_its_place(
    hub, new_loader, settings
):
    (small,) = add_files(hub, "small")
    large = hub.add_file("/large.safetensors", safetensors("large", 2000))
    loader = new_loader(replace(settings, memory_bytes=1000))
    hits = [loader.load(text).hit for text in (small, large, large, small)]
    assert hits == ["download", "download", "disk", "memory"]


def test_same_content_under_two_names_is_one_adapter(hub, loader):
    content = safetensors("same")
    one = loader.load(hub.add_file("/one.safetensors", content))
    two = loader.load(hub.add_file("/two.safetensors", content))
    packed = loader.load(hub.add_file("/packed.tar", tar({"any.safetensors": content})))
    assert one.adapter is two.adapter is packed.adapter
    assert (one.hit, two.hit) == ("download", "download")
    assert two.source.endswith("/two.safetensors")


def test_a_source_that_hangs_holds_up_one_request_in_a_while(hub, new_loader, settings, caplog):
    loader = new_loader(replace(settings, http=replace(settings.http, answer_timeout=1)))
    (text,) = add_files(hub, "x")
    loader.load(text)
    hub.drip_header("/x")
    assert loader.load(text).hit == "memory"
    asked = len(hub.requests)
    assert loader.load(text).hit == "memory"
    assert len(hub.requests) == asked
    assert "its source did not answer, and is asked again in" in caplog.text


def test_bad_file_is_named_and_the_next_request_is_fine(hub, new_loader):
    def refuse_bad(path, digest, settings):
        adapter = parse(path, digest, settings)
        if adapter.content == "bad":
            raise AdapterError("no module of FLUX.1 matches")
        return adapter

    loader = new_loader(parse=refuse_bad)
    bad, good = add_files(hub, "bad", "good")
    for _ in range(2):
        with pytest.raises(InvalidFileError, match=r"bad\.safetensors: no module of FLUX"):
            loader.load(bad)
    assert loader.load(good).adapter.content == "good"


def test_failed_download_leaves_no_hit_behind(hub, loader):
    text = hub.add_file("/x.safetensors", safetensors("x"), ranges=False)
    hub.cut("/x", after=5, times=99)
    for _ in range(2):
        with pytest.raises(SourceUnavailableError):
            loader.load(text)
    hub.heal()
    assert loader.load(text).hit == "download"


@pytest.mark.parametrize("etag", [True, False])
def test_what_is_left_of_a_failed_download_is_what_can_be_continued(hub, loader, settings, etag):
    text = hub.add_file("/x.safetensors", safetensors("x"), etag=etag, ranges=False)
    for _ in range(3):
        hub.cut("/x", after=5, times=99)
        with pytest.raises(SourceUnavailableError):
            loader.load(text)
        hub.heal()
    parts = list((settings.cache.root / "parts").iterdir())
    assert [part.stat().st_size for part in parts] == ([5] if etag else [])


def test_storage_down_after_a_retrain_serves_the_file_from_before(hub, loader, huggingface, caplog):
    repository = huggingface.add("o/n", {"a.safetensors": safetensors("old")})
    loader.load("huggingface.co/o/n")
    repository.commit({"a.safetensors": safetensors("new")})
    hub.fail("/cdn/", 503)
    assert loader.load("huggingface.co/o/n").adapter.content == "old"
    assert "may be out of date" in caplog.text
    assert loader.load("huggingface.co/o/n").adapter.content == "new"


def test_broken_download_of_a_retrained_model_goes_on(hub, loader):
    url = hub.add_file("/x.safetensors", safetensors("old"))
    loader.load(url)
    hub.add_file("/x.safetensors", safetensors("new"))
    hub.cut("/x", after=5, times=2)
    assert loader.load(url).adapter.content == "new"
    assert hub.requests[-1].headers["range"] == "bytes=5-"


def test_file_evicted_just_before_it_is_opened_is_fetched_again(
    hub, new_loader, settings, monkeypatch
):
    (text,) = add_files(hub, "x")
    new_loader().load(text)
    loader, open_file = new_loader(), FileCache.in_use

    def evicted_meanwhile(cache, record):
        monkeypatch.setattr(FileCache, "in_use", open_file)
        for path in (settings.cache.root / "objects").iterdir():
            path.unlink()
        return open_file(cache, record)

    monkeypatch.setattr(FileCache, "in_use", evicted_meanwhile)
    assert loader.load(text).hit == "download"


def _load(settings, texts, start, hits):
    start.wait(30)
    with closing(AdapterLoader(settings, parse)) as loader:
        for text in texts:
            hits.put(loader.load(text).hit)


def test_processes_that_ask_at_once_share_one_download(hub, settings):
    content = safetensors("x", 200_000)
    text = hub.add_file("/x.safetensors", content)
    hub.drip("/x.safetensors", size=100_000, seconds=0.1, times=99)
    context = multiprocessing.get_context("spawn")
    start, hits = context.Event(), context.SimpleQueue()
    processes = [context.Process(target=_load, args=(settings, [text], start, hits)) for _ in "12"]
    for process in processes:
        process.start()
    start.set()
    found = sorted(hits.get() for _ in processes)
    for process in processes:
        process.join()
        process.close()
    assert found == ["disk", "download"]


def test_a_wait_for_another_process_that_fetches_the_same_can_be_cancelled(hub, new_loader):
    text = hub.add_file("/x.safetensors", safetensors("x", 100_000))
    hub.drip("/x.safetensors", size=500, seconds=0.1, times=2)  # until it is cancelled as well
    waits, asked = threading.Event(), itertools.count(1)

    def cancel_the_wait():
        if hub.count("GET", "/x.safetensors") == 3 and next(asked) == 2:
            # It has tried for the lock.
            waits.set()
            raise KeyboardInterrupt

    def cancel_the_other():
        if waits.is_set():
            raise KeyboardInterrupt

    def fetch():
        with pytest.raises(KeyboardInterrupt):
            new_loader().load(text, cancel_the_other)

    other = threading.Thread(target=fetch, daemon=True)
    other.start()
    while hub.count("GET", "/x.safetensors") < 2:
        assert other.is_alive()
        time.sleep(0.01)
    with pytest.raises(KeyboardInterrupt):
        new_loader().load(text, cancel_the_wait)
    other.join()


def test_two_processes_and_twenty_adapters_at_once_fetch_each_once(hub, settings):
    texts = add_files(hub, *(f"shared{number}" for number in range(20)))
    context = multiprocessing.get_context("spawn")
    start, hits = context.Event(), context.SimpleQueue()
    processes = [
        context.Process(target=_load, args=(settings, order, start, hits))
        for order in (texts, texts[::-1])
    ]
    for process in processes:
        process.start()
    start.set()
    found = sorted(hits.get() for _ in range(40))
    for process in processes:
        process.join()
        process.close()
    assert found == ["disk"] * 20 + ["download"] * 20


def test_settings_come_from_the_environment():
    settings = LoaderSettings.of(
        Settings.from_environment(
            {
                "HF_ENDPOINT": "http://mirror/",
                "HF_TOKEN": " hf_x\n",
                "CIVITAI_API_TOKEN": "",
                "LORA_CACHE_GB": "0.5",
                "FLUX_CACHE_DIRECTORY": "/cache",
                "LORA_ALLOW_PRIVATE_HOSTS": "true",
            }
        )
    )
    assert settings.deployment.hf_endpoint == "http://mirror"
    assert (settings.deployment.hf_token, settings.deployment.civitai_token) == ("hf_x", None)
    assert (str(settings.cache.root), settings.cache.max_bytes) == ("/cache/adapters", 500_000_000)
    assert settings.http.allow_private_hosts
    assert not settings.deployment.lora_allow_local_paths
    assert "hf_x" not in repr(settings)


def test_getting_files_does_not_import_torch():
    code = "import sys, lora.loader, weights.download.cache; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
