"""Names that trainers made up: a file is read like the same file under diffusers' names."""

import copy

import pytest
import torch

from tests.lora.adapters import RANK, lora
from tests.support import tiny

DOUBLE, SINGLE = "transformer_blocks.0", "single_transformer_blocks.1"
IMAGE = tuple(f"attn.to_{x}" for x in "qkv")
TEXT = tuple(f"attn.add_{x}_proj" for x in "qkv")
# (a block of the model, a module of it as a trainer calls it, its parts in the order of rows)
FUSED = [
    (DOUBLE, "attn.to_qkv", IMAGE),
    (DOUBLE, "attn.to_added_qkv", TEXT),
    (DOUBLE, "attn.add_qkv_proj", TEXT),
    (SINGLE, "attn.to_qkv", IMAGE),
]


def assert_read_alike(flux, tmp_path, spelled, modules, component="transformer"):
    """`spelled` makes up a file from a fused pair of factors of `modules`, diffusers' names."""
    shapes = [flux[component].get_submodule(name).weight.shape for name in modules]
    rows = [shape[0] for shape in shapes]
    down, up = tiny.factors(sum(rows), shapes[0][1], RANK)
    plain = {}
    for name, part in zip(modules, up.split(rows), strict=True):
        plain[f"{component}.{name}.lora_A.weight"] = down
        plain[f"{component}.{name}.lora_B.weight"] = part
    expected = tiny.load(tmp_path / "plain", flux, plain)
    adapter = tiny.load(tmp_path / "spelled", flux, spelled(down, up))
    assert adapter.ignored == ()
    tiny.assert_same(tiny.deltas(adapter, flux), tiny.deltas(expected, flux))
    return adapter


@pytest.mark.parametrize(("block", "name", "parts"), FUSED)
@pytest.mark.parametrize("prefix", ["transformer.", "base_model.model.", "lycoris_"])
def test_fused_projections(flux, tmp_path, block, name, parts, prefix):
    module = f"{block}.{name}"
    if prefix == "lycoris_":
        module = module.replace(".", "_")

    def spelled(down, up):
        names = ("lora_down", "lora_up") if prefix == "lycoris_" else ("lora_A", "lora_B")
        pairs = zip(names, (down, up), strict=True)
        return {f"{prefix}{module}.{name}.weight": factor for name, factor in pairs}

    adapter = assert_read_alike(flux, tmp_path, spelled, [f"{block}.{part}" for part in parts])
    assert adapter.format.endswith(" keys, fused diffusers names, LoRA")


@pytest.mark.parametrize(
    ("block", "name"), [(DOUBLE, "to_qkv"), (DOUBLE, "to_added_qkv"), (SINGLE, "to_qkv")]
)
def test_diffusers_fuses_projections_under_these_names(flux, tmp_path, block, name):
    """What the parts become is what the fused module of diffusers would."""
    changed = copy.deepcopy(flux["transformer"].get_submodule(f"{block}.attn"))
    fused = copy.deepcopy(changed)
    fused.fuse_projections()
    weight = fused.get_submodule(name).weight.detach()
    tensors = lora(f"transformer.{block}.attn.{name}", *weight.shape)
    down, up = tensors.values()
    with torch.no_grad():
        adapter = tiny.load(tmp_path / "a", flux, tensors)
        for (_, parameter), delta in tiny.deltas(adapter, flux).items():
            changed.get_parameter(parameter.removeprefix(f"{block}.attn.")).add_(delta)
    changed.fuse_projections()
    torch.testing.assert_close(changed.get_submodule(name).weight.detach(), weight + up @ down)
