"""Float8 weights on disk: the same images, from a start that does not read the bf16 weights."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from flux.components import load_skeleton
from flux.deployment import NANO
from flux.memory.budget import bytes_of
from flux.quantize import main
from flux.transformers.float8 import float8_parameters
from flux.transformers.skeleton import size
from tests.support.adapters import adapter
from tests.support.pictures import colours, data_uri, same

FAST = {"go_fast": True}
PAGE = 4096


@pytest.fixture(scope="module")
def quantized(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("quantized")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLUX_CHECKPOINT", "nano")
        patch.setattr("sys.argv", ["script/quantize", "--directory", str(directory)])
        assert main() == 0
    return directory


@pytest.fixture(scope="module")
def style() -> str:
    return data_uri(save(adapter(1)))


@pytest.fixture
def small(tmp_path) -> dict[str, object]:
    """Inputs for a picture that is generated quickly."""
    colours(64, 48).save(tmp_path / "picture.png")
    return {"image": tmp_path / "picture.png", "num_inference_steps": 1}


@pytest.fixture
def fast(start, quantized) -> Callable:
    """A predictor that starts with float8 transformers alone, from the files."""

    def set_up(**environment: str) -> Callable:
        files = {"FLUX_QUANTIZED_DIRECTORY": str(quantized), "FLUX_AT_START": "fp8"}
        return start(**files | environment)

    return set_up


def test_every_image_is_the_same_to_the_bit(usual, fast, small, style) -> None:
    quick = fast()
    requests = [
        {**FAST, "model": "dev"},
        {**FAST, "model": "schnell"},
        {**FAST, "model": "dev", "replicate_weights": style},
        {**FAST, "model": "dev"},
        {"model": "schnell"},
        {"model": "dev", "replicate_weights": style},
    ]
    for request in requests:
        assert same(quick(**small, **request)[0], usual(**small, **request)[0]), request


@pytest.mark.parametrize("other", [{"FLUX_FP8_ACTIVATIONS": "fp8"}, {"FLUX_OFFLOAD": "all"}])
def test_the_files_serve_other_deployments(start, fast, small, other) -> None:
    assert same(fast(**other)(**small, **FAST)[0], start(**other)(**small, **FAST)[0])


def spoil(transformer: Path) -> None:
    """Overwrite all but the first page of every tensor, by which checkpoints are told apart."""
    (path,) = transformer.glob("*.safetensors")
    tensors = load_file(path)
    for tensor in tensors.values():
        tensor.view(torch.uint8).view(-1)[PAGE:] = 0
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize("opens", ["bf16", "adapter"])
def test_the_bf16_weights_are_not_read_before_they_are_needed(
    usual, fast, copied, small, style, caplog, opens: str
) -> None:
    expected = usual(**small, **FAST)[0]
    request = {**FAST, "replicate_weights": style} if opens == "adapter" else {}
    right = usual(**small, **request)[0]
    for variant in ("dev", "schnell"):
        spoil(copied / variant / "transformer")
    caplog.clear()
    generate = fast(FLUX_CHECKPOINT=str(copied))
    assert same(generate(**small, **FAST)[0], expected)
    assert same(generate(**small, **FAST, replicate_weights=style, lora_scale=0)[0], expected)
    assert "Loading dev base weights" not in caplog.messages
    assert not same(generate(**small, **request)[0], right)  # generated with the spoilt weights
    assert "Loading dev base weights" in caplog.messages
    assert "Loading schnell base weights" not in caplog.messages


def test_where_the_bf16_weights_are_read_anyway_no_file_is(
    usual, fast, quantized, small, caplog
) -> None:
    expected = usual(**small, **FAST)[0]
    caplog.clear()
    everything = fast(FLUX_AT_START="all")
    assert "dev fp8 is on cpu" in caplog.text
    assert str(quantized) not in caplog.text  # the table of setup says where weights are from
    assert same(everything(**small, **FAST)[0], expected)


def test_a_default_adapter_opens_what_it_changes(
    start, fast, small, style, monkeypatch, caplog
) -> None:
    monkeypatch.setattr("predict.Predictor.setup.__defaults__", (style,))
    expected = start()(**small, **FAST)[0]
    caplog.clear()
    assert same(fast()(**small, **FAST)[0], expected)
    assert "Loading dev base weights" in caplog.messages


def test_transformers_that_take_turns_come_from_the_files(usual, fast, small, caplog) -> None:
    shared = FluxPipeline.from_pretrained(NANO / "dev", dtype=torch.float32, transformer=None)
    model = load_skeleton("dev", NANO / "dev" / "transformer", torch.float32)
    needed = sum(map(bytes_of, (shared.vae, shared.text_encoder, shared.text_encoder_2)))
    room = str((needed + size(model, float8_parameters(model))) / 1e9 + 1e-6)
    caplog.clear()
    narrow = fast(FLUX_DEVICE_MEMORY_GB=room)
    for model in ("dev", "schnell", "dev"):
        request = {**small, **FAST, "model": model}
        assert same(narrow(**request)[0], usual(**request)[0])
    assert "dev fp8 leaves cpu" in caplog.messages
    assert "Loading dev base weights" not in caplog.messages


def test_a_server_may_run_as_another_user_than_wrote_the_files(quantized) -> None:
    assert {path.stat().st_mode & 0o777 for path in quantized.glob("*.safetensors")} == {0o644}


# --- files that do not serve


def rewrite(path: Path, change: Callable[[dict, dict], None]) -> None:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata)


def identity(**fields: str) -> Callable[[dict, dict], None]:
    def change(_: dict, metadata: dict) -> None:
        found = json.loads(metadata["flux_fine_tune"])
        metadata["flux_fine_tune"] = json.dumps(found | fields)

    return change


def another_shape(tensors: dict, _: dict) -> None:
    tensors["x_embedder.bias"] = tensors["x_embedder.bias"][:-1].clone()


def one_less(tensors: dict, _: dict) -> None:
    del tensors["x_embedder.bias"]


def unquantized(tensors: dict, metadata: dict) -> None:
    name = "single_transformer_blocks.0.attn.to_q"
    values = tensors.pop(f"{name}._weight_qdata").bfloat16()
    del tensors[f"{name}._weight_scale"]
    tensors[f"{name}.weight"] = values
    metadata[f"{name}.weight"] = metadata["x_embedder.bias"]


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


REFUSALS = {
    "no such file": Path.unlink,
    "damaged or incomplete": cut_off,
    "was not made by script/quantize": lambda path: save_file({"a": torch.zeros(1)}, path),
    "by another version": lambda path: rewrite(path, identity(colour="red")),
    "its recipe is '0'": lambda path: rewrite(path, identity(recipe="0")),
    "was made from schnell of nano": lambda path: shutil.copy(
        path.with_name("schnell.safetensors"), path
    ),
    r"x_embedder.bias is \[\(159,\)\], expected \[\(160,\)\]": lambda p: rewrite(p, another_shape),
    "x_embedder.bias is None": lambda path: rewrite(path, one_less),
    r"to_q.weight is \[\(160, 160\)\], expected \[\(160, 160\), \(160, 1\)\]": (
        lambda path: rewrite(path, unquantized)
    ),
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_a_file_that_does_not_serve_fails_setup(fast, quantized, tmp_path, reason: str) -> None:
    directory = Path(shutil.copytree(quantized, tmp_path / "files"))
    REFUSALS[reason](directory / "dev.safetensors")
    message = rf"dev\.safetensors: .*{reason}.*Run script/quantize again"
    with pytest.raises(RuntimeError, match=message):
        fast(FLUX_QUANTIZED_DIRECTORY=str(directory))


def test_files_of_another_checkpoint_are_refused(fast, copied) -> None:
    """Of the same shapes, with one weight that differs in one value."""
    (path,) = (copied / "dev" / "transformer").glob("*.safetensors")
    tensors = load_file(path)
    tensors["proj_out.weight"][0, 0] += 1
    save_file(tensors, path, {"format": "pt"})
    message = rf"was made from dev of nano .*, and {copied}/dev/transformer is .*script/quantize"
    with pytest.raises(RuntimeError, match=message):
        fast(FLUX_CHECKPOINT=str(copied))


def test_a_checkpoint_that_is_cut_off_fails_setup_although_it_is_not_opened(fast, copied) -> None:
    cut_off(next((copied / "schnell" / "transformer").glob("*.safetensors")))
    with pytest.raises(
        RuntimeError,
        match=r"damaged or cut off: .* bytes and it has \d+\. Download it again\. Fetch",
    ):
        fast(FLUX_CHECKPOINT=str(copied))
