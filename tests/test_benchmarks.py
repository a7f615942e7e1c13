"""script/bench gpu where there is no card: what it says, and its code on the miniature."""

import json
from collections.abc import Iterator

import gpu
import pytest
import torch

CONTENDERS = {"diffusers, bf16", "ours, bf16", "ours, fp8"}
SWAPS = {"diffusers, unload + load"} | {
    f"ours, {precision}, {state}" for precision in ("bf16", "fp8") for state in ("warm", "cold")
}


@pytest.fixture(autouse=True)
def grad_mode() -> Iterator[None]:
    """A benchmark turns gradients off for its process; here it shares one."""
    with torch.no_grad():
        yield


@pytest.fixture
def bench(monkeypatch, capsys, tmp_path):
    def run(*arguments: str) -> tuple[str, dict | None]:
        file = tmp_path / "report.json"
        monkeypatch.setattr("sys.argv", ["gpu", "--json", str(file), *arguments])
        assert gpu.main() == 0
        return capsys.readouterr().out, json.loads(file.read_text()) if file.exists() else None

    return run


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_card_it_says_so(bench) -> None:
    text, report = bench()
    assert text.startswith("script/bench gpu: skipped: there is no CUDA device")
    assert report is None


def test_without_the_weights_it_says_so_and_fetches_nothing(bench, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    text, report = bench("--device", "cpu")
    assert "FLUX.1 [dev] and FLUX.1 [schnell] not found (official)" in text
    assert "script/download" in text
    assert report is None


def test_its_code_on_the_miniature(bench) -> None:
    small = ("--size", "64", "--steps", "1", "--rounds", "1")
    _, report = bench("--checkpoint", "nano", "--device", "cpu", *small)
    assert set(report["variants"]) == {"dev", "schnell"}
    assert report["machine"]["torch"] == torch.__version__
    for variant in report["variants"].values():
        for images in variant["images"].values():
            assert set(images["median_seconds"]) == CONTENDERS
            assert min(images["median_seconds"].values()) > 0
            assert images["times_diffusers"]["diffusers, bf16"] == 1
        assert set(variant["swap_ms"]) == SWAPS
        assert min(variant["swap_ms"].values()) > 0
