"""Adapters with PEFT's configuration in the caches: found again, told apart, told from before."""

from dataclasses import replace

import pytest

from tests.lora.saved_by_peft import ALPHA, CONFIG, RANK, WEIGHTS, config
from weights.serving.errors import InvalidFileError


def test_another_configuration_is_another_adapter(case, huggingface):
    repository = huggingface.add("o/n", case.files)
    loader = case.loader()
    first = loader.load("huggingface.co/o/n")
    repository.commit({**case.files, CONFIG: config(use_rslora=True)})
    second = loader.load("huggingface.co/o/n")
    repository.commit({WEIGHTS: case.weights})
    third = loader.load("huggingface.co/o/n")
    strengths = [case.strength(loaded.adapter) for loaded in (first, second, third)]
    assert strengths == pytest.approx([ALPHA / RANK, ALPHA / RANK**0.5, 1])
    assert len({loaded.adapter.digest for loaded in (first, second, third)}) == 3


def test_a_changed_configuration_on_this_machine_is_noticed(case, serve):
    text = serve("path", case.files)
    assert case.load(text) == pytest.approx(ALPHA / RANK)
    serve("path", {CONFIG: config(use_rslora=True)})
    assert case.load(text) == pytest.approx(ALPHA / RANK**0.5)


def test_the_configuration_lies_beside_a_link(case, tmp_path):
    """As in the cache of huggingface_hub, whose files are links to others named by their hash."""
    (tmp_path / "blob").write_bytes(case.weights)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / WEIGHTS).symlink_to(tmp_path / "blob")
    (tmp_path / "mine" / CONFIG).write_bytes(config())
    assert case.load(str(tmp_path / "mine" / WEIGHTS)) == pytest.approx(ALPHA / RANK)


def test_it_is_fetched_once_and_found_again(case, hub, huggingface):
    repository = huggingface.add("o/n", case.files)
    text = f"huggingface.co/o/n/tree/{repository.branches['main']}"
    case.load(text)
    asked = len(hub.requests)
    again = case.loader().load(text)
    assert (again.hit, case.strength(again.adapter)) == ("disk", pytest.approx(ALPHA / RANK))
    assert len(hub.requests) == asked
    assert case.loader().load("huggingface.co/o/n").hit == "disk"
    assert hub.count("GET", "/cdn/") == 1


def test_the_same_file_in_two_places_is_two_adapters(case, tmp_path):
    """One with a configuration and one without; on the disk, and in memory."""
    for folder in ("with", "without"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / WEIGHTS).write_bytes(case.weights)
    (tmp_path / "with" / CONFIG).write_bytes(config())
    loader = case.loader()
    for _ in range(2):
        for folder, strength in (("with", ALPHA / RANK), ("without", 1)):
            adapter = loader.load(str(tmp_path / folder / WEIGHTS)).adapter
            assert case.strength(adapter) == pytest.approx(strength)


def test_a_link_to_the_file_itself_reads_it_too(case, huggingface):
    huggingface.add("o/n", case.files)
    text = f"huggingface.co/o/n/blob/main/{WEIGHTS}"
    assert case.load(text) == pytest.approx(ALPHA / RANK)


def test_wrong_hash_of_the_original_is_refused(case, huggingface):
    huggingface.add("o/n", case.files, announced_sha256="0" * 64)
    with pytest.raises(InvalidFileError, match="announces 000"):
        case.load("huggingface.co/o/n")
    assert case.weights not in [path.read_bytes() for path in case.stored()]


def test_the_configuration_of_a_private_repository(case, hub, huggingface):
    huggingface.add("o/n", case.files, token="hf_mine")
    deployment = replace(case.settings.deployment, hf_token="hf_mine")
    case.settings = replace(case.settings, deployment=deployment)
    assert case.load("huggingface.co/o/n") == pytest.approx(ALPHA / RANK)
    assert {request.token for request in hub.seen("HEAD", CONFIG)} == {"hf_mine"}
