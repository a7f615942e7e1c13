"""script/quantize: the files that it writes, and what it says."""

import os
import re
import resource
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict
from torchao.quantization import Float8WeightOnlyConfig, quantize_

from flux.deployment import NANO
from flux.quantize import main
from flux.transformers.float8 import float8_parameters
from tests.support.services import tar

ROOT = Path(__file__).parents[2]


def quantize(directory: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [ROOT / "script" / "quantize", "--directory", directory, *arguments],
        env={**os.environ, "FLUX_CHECKPOINT": "nano", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def status() -> int:
    """What the script ends with, run in this process."""
    try:
        return main()
    except SystemExit as ended:
        return int(ended.code or 0)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    directory = tmp_path_factory.mktemp("quantized")
    return directory, quantize(directory)


@pytest.fixture(scope="module")
def quantized(made) -> Path:
    return made[0]


def test_the_script_says_what_it_writes_and_nothing_else(made) -> None:
    directory, result = made
    assert result.returncode == 0, result.stderr
    assert f"{directory}/dev.safetensors: 0.004 GB" in result.stderr
    assert f"FLUX_QUANTIZED_DIRECTORY={directory}" in result.stderr
    assert "torchao" not in result.stderr
    assert "torchvision" not in result.stderr
    assert {p.name for p in directory.glob("*.safetensors")} == {
        "dev.safetensors",
        "schnell.safetensors",
    }
    assert not list(directory.glob("*.draft"))


def test_the_secret_of_a_checkpoints_url_is_in_no_file(hub, monkeypatch, tmp_path, caplog) -> None:
    caplog.set_level("INFO")
    paths = [path for path in (NANO / "dev").rglob("*") if path.is_file()]
    files = {path.relative_to(NANO).as_posix(): path.read_bytes() for path in paths}
    url = hub.add_file("/flux.tar", tar(files | {"schnell/notes.txt": b""}))
    monkeypatch.setenv("FLUX_CHECKPOINT", f"{url}?signature=geheim")
    monkeypatch.setenv("FLUX_CACHE_DIRECTORY", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["script/quantize", "--directory", str(tmp_path), "dev"])
    assert status() == 0
    content = (tmp_path / "dev.safetensors").read_bytes()
    assert url.encode() in content
    assert b"geheim" not in content
    assert "geheim" not in caplog.text


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (
            ["--directory", "files"],
            {"FLUX_CHECKPOINT": "/absent"},
            "flux.quantize: FLUX_CHECKPO",
        ),
        (["--directory", "files"], {"FLUX_CHECKPOINT": "float32"}, "holds F32; only a checkpoint"),
        (["--directory", "files", "pro"], {}, "no such variant: pro"),
        ([], {}, "name a directory: --directory, or FLUX_QUANTIZED_DIRECTORY"),
    ],
)
def test_the_script_says_what_is_wrong(
    monkeypatch, copied, caplog, capsys, arguments, environment, message
) -> None:
    copied.rename(copied.with_name("float32"))
    monkeypatch.chdir(copied.parent)
    path = next(Path("float32/dev/transformer").glob("*.safetensors"))
    save_file({name: tensor.float() for name, tensor in load_file(path).items()}, path)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", ["script/quantize", *arguments])
    assert status() > 0
    assert message in caplog.text + capsys.readouterr().err
    assert not Path("files").exists()


def test_an_interrupted_run_leaves_the_files_as_they_were(
    monkeypatch, quantized, copied, caplog
) -> None:
    directory = Path(shutil.copytree(quantized, copied.parent / "files"))
    before = {path.name: path.read_bytes() for path in directory.iterdir()}

    def interrupted(tensors: dict, path: Path, metadata: dict) -> None:
        path.write_bytes(bytes(1000))
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.argv", ["script/quantize", "--directory", str(directory)])
    monkeypatch.setenv("FLUX_CHECKPOINT", "nano")
    with monkeypatch.context() as patch:
        patch.setattr("flux.transformers.prequantized.save_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            main()
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    full = shutil.disk_usage(directory)._replace(free=1_000_000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: full)
    assert status() == 1
    assert "0.00 GB are to be written, and the disk has 0.00 GB free" in caplog.text
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


def test_a_directory_that_cannot_be_written_is_named(monkeypatch, caplog) -> None:
    monkeypatch.setattr("sys.argv", ["script/quantize", "--directory", "/dev/null/files"])
    monkeypatch.setenv("FLUX_CHECKPOINT", "nano")
    assert status() == 1
    assert "/dev/null/files: this directory cannot be written" in caplog.text
    assert "set --directory or FLUX_QUANTIZED_DIRECTORY" in caplog.text


def test_what_a_killed_run_has_left_takes_no_room(monkeypatch, tmp_path) -> None:
    def usage(place: Path) -> object:
        left = sum(file.stat().st_size for file in Path(place).iterdir())
        return SimpleNamespace(free=12_000_000 - left)

    (tmp_path / "dev.draft").write_bytes(bytes(11_000_000))
    monkeypatch.setattr("shutil.disk_usage", usage)
    monkeypatch.setattr("sys.argv", ["script/quantize", "dev", "--directory", str(tmp_path)])
    monkeypatch.setenv("FLUX_CHECKPOINT", "nano")
    assert status() == 0


def test_a_file_that_cannot_be_written_to_its_end_is_named(monkeypatch, tmp_path, caplog) -> None:
    monkeypatch.setattr("sys.argv", ["script/quantize", "--directory", str(tmp_path)])
    monkeypatch.setenv("FLUX_CHECKPOINT", "nano")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        assert status() == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert re.search(r"dev\.safetensors: cannot be written .*File too large", caplog.text)
    assert list(tmp_path.glob("*.draft")) == []


def test_torchao_reads_the_files_and_finds_its_own_bits(quantized) -> None:
    """Against torchao's quantize_ of the checkpoint, each weight and each answer."""
    ours, theirs = (
        FluxTransformer2DModel.from_pretrained(NANO / "dev/transformer", dtype=torch.float32)
        for _ in range(2)
    )
    names = float8_parameters(theirs)
    quantize_(theirs, Float8WeightOnlyConfig(), lambda _, name: f"{name}.weight" in names)
    path = quantized / "dev.safetensors"
    with safe_open(path, framework="pt") as file:
        state, rest = unflatten_tensor_state_dict(load_file(path), file.metadata())
    assert rest == {}
    found = dict(theirs.named_parameters())
    assert state.keys() == found.keys()
    for name, value in state.items():
        if name in names:
            assert torch.equal(value.qdata.view(torch.uint8), found[name].qdata.view(torch.uint8))
            assert torch.equal(value.scale, found[name].scale)
        else:
            assert torch.equal(value.float(), found[name])
    ours.load_state_dict(state, assign=True)
    inputs = {
        "hidden_states": torch.randn(1, 4, ours.config.in_channels),
        "encoder_hidden_states": torch.randn(1, 3, ours.config.joint_attention_dim),
        "pooled_projections": torch.randn(1, ours.config.pooled_projection_dim),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([2.0]),  # times 1000, a number in bfloat16 too
    }
    places = {"img_ids": torch.zeros(4, 3), "txt_ids": torch.zeros(3, 3)}
    with torch.no_grad():
        exact = theirs(**inputs, **places).sample
        found = ours(**{n: t.bfloat16() for n, t in inputs.items()}, **places).sample.float()
    assert (found - exact).norm() < 0.02 * exact.norm()
