"""Adapters from every source, over HTTP: they change the picture, and leave no trace."""

import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save, save_file

from miniature.checkpoint import Dimensions
from serving.server import Server, ServerError
from tests.support.adapters import adapter
from tests.support.hub import Hub
from tests.support.inputs import SMALL, UNCHECKED
from tests.support.pictures import data_uri, difference, same
from tests.support.server import LoggedServer, logged_server
from tests.support.services import Civitai, HuggingFace, Replicate, trained_on_replicate
from weights.serving.errors import WeightsError

RAW = {"output_format": "png", "num_inference_steps": 1, **SMALL, **UNCHECKED}
FAST = {**RAW, "aspect_ratio": "1:1", "go_fast": True}
VERSION = "0a" * 32
SECRETS = {
    "HF_TOKEN": "hf_secret_token",
    "CIVITAI_API_TOKEN": "civitai-secret-token",
    "REPLICATE_API_TOKEN": "r8_secret_token",
}
KOHYA = "lora_te1_text_model_encoder_layers_0_mlp_fc1"  # CLIP, as kohya spells it


def content(seed: int) -> bytes:
    return save(adapter(seed))


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def environment(hub, tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        "HF_ENDPOINT": hub.url,
        "CIVITAI_ENDPOINT": hub.url,
        "REPLICATE_ENDPOINT": hub.url,
        "LORA_ALLOW_PRIVATE_HOSTS": "true",
        "FLUX_CACHE_DIRECTORY": str(root / "cache"),
        "HF_HOME": str(root / "hf"),
        **SECRETS,
    }


@pytest.fixture(scope="module")
def server(environment, tmp_path_factory) -> Iterator[LoggedServer]:
    with logged_server(tmp_path_factory.mktemp("outputs"), **environment) as running:
        yield running


@pytest.fixture(scope="module")
def base(server) -> Image.Image:
    """The picture without an adapter."""
    return server.generate(**RAW).image


@pytest.fixture(scope="module")
def references(hub) -> dict[str, str]:
    """A reference for each source, each to an adapter of its own."""
    huggingface, civitai, replicate = HuggingFace(hub), Civitai(hub), Replicate(hub)
    huggingface.add("someone/style", {"lora.safetensors": content(1), "README.md": b"#"})
    civitai.add(11, 1111, content(2), token=SECRETS["CIVITAI_API_TOKEN"])
    replicate.add("fofr/flux-x", trained_on_replicate(content(3)), VERSION)
    replicate.add("fofr/flux-y", trained_on_replicate(content(4)))
    return {
        "Hugging Face": f"{hub.url.replace('http://', '')}/someone/style",
        "Hugging Face page": "huggingface.co/someone/style",
        "CivitAI": "civitai.com/models/11/a-name",
        "CivitAI download": "https://civitai.com/api/download/models/1111?type=Model",
        "Replicate": "fofr/flux-y",
        "Replicate version": f"fofr/flux-x:{VERSION}",
        "safetensors URL": hub.add_file("/files/a.safetensors", content(5)) + "?signature=secret",
        "data URI": data_uri(content(6)),
    }


SOURCES = [
    "Hugging Face page",
    "CivitAI",
    "CivitAI download",
    "Replicate",
    "Replicate version",
    "safetensors URL",
    "data URI",
]


@pytest.mark.parametrize("source", SOURCES)
def test_each_source(server, base, references, source: str) -> None:
    first = server.generate(replicate_weights=references[source], **RAW)
    assert difference(first.image, base) > 1
    assert re.search(r"Adapter .*, 16 modules, 0 keys ignored.* scale 1\n", first.logs)
    assert same(server.generate(**RAW).image, base)
    second = server.generate(replicate_weights=references[source], **RAW)
    assert same(second.image, first.image)
    assert "from memory" in second.logs
    extra = server.generate(extra_lora=references[source], **RAW)
    assert same(extra.image, first.image)


def test_scales_and_sums(server, base, references) -> None:
    one, two = references["CivitAI"], references["Replicate"]

    def generate(**inputs: object) -> Image.Image:
        return server.generate(**RAW, **inputs).image

    full = generate(replicate_weights=one)
    assert same(generate(replicate_weights=one, lora_scale=0), base)
    half, minus = (generate(replicate_weights=one, lora_scale=s) for s in (0.5, -1))
    assert difference(half, full) > 0.5
    assert difference(minus, full) > 0.5
    quarters = {"lora_scale": 0.25, "extra_lora_scale": 0.25}
    assert same(generate(replicate_weights=one, extra_lora=one, **quarters), half)
    both = generate(replicate_weights=one, extra_lora=two, extra_lora_scale=0.5)
    assert difference(both, full) > 0.5
    assert same(generate(replicate_weights=two, lora_scale=0.5, extra_lora=one), both)
    assert same(generate(), base)


def test_schnell_and_the_other_modes_take_adapters(server, references) -> None:
    picture = data_uri(Image.linear_gradient("L"))
    for inputs in ({"model": "schnell"}, {"image": picture}, {"image": picture, "mask": picture}):
        base = server.generate(**RAW, **inputs).image
        changed = server.generate(**RAW, **inputs, replicate_weights=references["Replicate"]).image
        assert difference(changed, base) > 0.5
        assert same(server.generate(**RAW, **inputs).image, base)


def test_the_prompt_cache_knows_adapters_of_the_text_encoders(server, base, hub) -> None:
    clip = Dimensions()
    down, up = torch.randn(2, clip.clip_width), torch.randn(clip.clip_feed_forward, 2)
    tensors = {f"{KOHYA}.lora_down.weight": down, f"{KOHYA}.lora_up.weight": up}
    url = hub.add_file("/files/clip.safetensors", save(tensors))
    changed = server.generate(**RAW, replicate_weights=url).image
    assert not same(changed, base)
    assert same(server.generate(**RAW).image, base)


def test_a_retrained_model_is_noticed(server, hub) -> None:
    replicate = Replicate(hub)
    replicate.add("someone/retrained", trained_on_replicate(content(21)))
    before = server.generate(**RAW, replicate_weights="someone/retrained").image
    replicate.add("someone/retrained", trained_on_replicate(content(22)))
    after = server.generate(**RAW, replicate_weights="someone/retrained").image
    assert difference(after, before) > 1


def test_trigger_words_are_in_the_log(server, references) -> None:
    assert "trigger words: TOK" in server.generate(**RAW, extra_lora=references["CivitAI"]).logs
    assert "trigger words: TOK" in server.generate(**RAW, extra_lora=references["Replicate"]).logs


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("not a reference at all", "owner/name"),
        ("nobody/nothing", "nobody/nothing"),
        ("huggingface.co/nobody/nothing", "nobody/nothing"),
        ("civitai.com/models/999", "civitai.com/models/999"),
        ("file:///etc/passwd", "owner/name"),
        ("/etc/passwd", "LORA_ALLOW_LOCAL_PATHS"),
        (data_uri(b"<html>sign in</html>"), "it is a web page"),
        (data_uri(save({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(4)})), ""),
        (data_uri(save({"transformer.nowhere.lora_A.weight": torch.zeros(4, 4)})), "nowhere"),
    ],
)
def test_errors_are_failed_predictions_and_change_nothing(server, base, reference, message) -> None:
    error = server.fail(**RAW, replicate_weights=reference)
    assert message in error
    assert same(server.generate(**RAW).image, base)


def test_no_secret_is_ever_logged(server, references) -> None:
    for source in SOURCES:
        server.generate(**RAW, replicate_weights=references[source])
    log = "\n".join(server.lines)
    for secret in (*SECRETS.values(), "signature=", "secret"):
        assert secret not in log


def test_a_restart_with_a_default_adapter_finds_the_files_on_disk(
    environment, references, server, tmp_path
) -> None:
    """COG_WEIGHTS names the adapter of requests that name none."""
    one, two = references["Replicate version"], references["CivitAI"]
    expected = server.generate(**RAW, replicate_weights=two).image
    with logged_server(tmp_path, **environment, COG_WEIGHTS=one) as fine_tune:
        assert any("weights merged" in line for line in fine_tune.lines)
        fast = fine_tune.generate(**FAST)
        assert "weights merged" not in fast.logs  # setup knows the multiplier
        assert same(fast.image, server.generate(**FAST, replicate_weights=one).image)
        assert same(
            fine_tune.generate(**RAW).image, server.generate(**RAW, replicate_weights=one).image
        )
        other = fine_tune.generate(**RAW, replicate_weights=two)
        assert same(other.image, expected)
        assert "from disk" in other.logs
        assert same(fine_tune.generate(**RAW, lora_scale=0).image, server.generate(**RAW).image)


def test_a_default_adapter_that_cannot_be_had_fails_setup(environment) -> None:
    bad = {**environment, "FLUX_CHECKPOINT": "nano", "COG_WEIGHTS": "nobody/nothing"}
    with pytest.raises(ServerError, match="nobody/nothing"), Server(bad):
        pass


def test_local_paths_only_where_the_operator_allows_them(
    environment, server, start, tmp_path
) -> None:
    path = tmp_path / "mine.safetensors"
    save_file(adapter(31), path)
    assert "LORA_ALLOW_LOCAL_PATHS" in server.fail(**RAW, replicate_weights=str(path))
    generate = start(**environment, LORA_ALLOW_LOCAL_PATHS="true")
    (base,), (styled,) = generate(**RAW), generate(**RAW, replicate_weights=str(path))
    assert difference(styled, base) > 1


def test_private_addresses_only_where_the_operator_allows_them(environment, hub, start) -> None:
    url = hub.add_file("/files/private.safetensors", content(41))
    generate = start(**{**environment, "LORA_ALLOW_PRIVATE_HOSTS": "false"})
    with pytest.raises(WeightsError, match="public internet"):
        generate(**RAW, replicate_weights=url)
    assert hub.count("GET", "/files/private.safetensors") == 0


def test_a_cancel_during_a_download(server, base, hub) -> None:
    url = hub.add_file("/files/slow.safetensors", content(61))
    hub.drip("/files/slow", size=300, seconds=0.2, times=2)
    final, waited = server.cancel("Using seed", **RAW, replicate_weights=url)
    assert final["status"] == "canceled"
    assert waited < 15  # seconds; the file takes over a minute
    hub.heal()
    assert same(server.generate(**RAW).image, base)
    assert difference(server.generate(**RAW, replicate_weights=url).image, base) > 1


def test_a_tar_with_one_adapter(server, base, hub, tmp_path) -> None:
    inside, outer = tmp_path / "lora.safetensors", tmp_path / "trained_model.tar"
    save_file(adapter(51), inside)
    with tarfile.open(outer, "w") as archive:
        archive.add(inside, "output/flux_train_replicate/lora.safetensors")
    url = hub.add_file("/files/trained_model.tar", Path(outer).read_bytes())
    assert difference(server.generate(**RAW, replicate_weights=url).image, base) > 1
