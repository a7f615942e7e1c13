"""Names that trainers made up: a file is read like the same file under diffusers' names."""

import copy

import pytest
import torch

from tests.lora.adapters import RANK, lora, random
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
# As DiffSynth-Studio's own loader turns diffusers' names into them.
DIFFSYNTH = [
    ("blocks.0.attn.a_to_qkv", DOUBLE, IMAGE),
    ("blocks.0.attn.b_to_qkv", DOUBLE, TEXT),
    ("blocks.0.attn.a_to_out", DOUBLE, ["attn.to_out.0"]),
    ("blocks.0.attn.b_to_out", DOUBLE, ["attn.to_add_out"]),
    ("blocks.0.ff_a.0", DOUBLE, ["ff.net.0.proj"]),
    ("blocks.0.ff_a.2", DOUBLE, ["ff.net.2"]),
    ("blocks.0.ff_b.0", DOUBLE, ["ff_context.net.0.proj"]),
    ("blocks.0.ff_b.2", DOUBLE, ["ff_context.net.2"]),
    ("blocks.0.norm1_a.linear", DOUBLE, ["norm1.linear"]),
    ("blocks.0.norm1_b.linear", DOUBLE, ["norm1_context.linear"]),
    ("single_blocks.1.to_qkv_mlp", SINGLE, [*IMAGE, "proj_mlp"]),
    ("single_blocks.1.proj_out", SINGLE, ["proj_out"]),
    ("single_blocks.1.norm.linear", SINGLE, ["norm.linear"]),
]
# As mflux maps the weights of diffusers' model to its own.
MFLUX = {
    "ff.linear1": "ff.net.0.proj",
    "ff.linear2": "ff.net.2",
    "ff_context.linear1": "ff_context.net.0.proj",
    "ff_context.linear2": "ff_context.net.2",
}


def assert_read_alike(flux, tmp_path, keys, modules):
    """Factors under `keys` are those of `modules`, one after the other."""
    shapes = [flux["transformer"].get_submodule(name).weight.shape for name in modules]
    rows = [shape[0] for shape in shapes]
    down, up = tiny.factors(sum(rows), shapes[0][1], RANK)
    plain = {}
    for name, part in zip(modules, up.split(rows), strict=True):
        plain[f"transformer.{name}.lora_A.weight"] = down
        plain[f"transformer.{name}.lora_B.weight"] = part
    expected = tiny.load(tmp_path / "plain", flux, plain)
    spelled = dict(zip(keys, (down, up), strict=True))
    adapter = tiny.load(tmp_path / "spelled", flux, spelled)
    assert adapter.ignored == ()
    tiny.assert_same(tiny.deltas(adapter, flux), tiny.deltas(expected, flux))
    return adapter


@pytest.mark.parametrize(("block", "name", "parts"), FUSED)
@pytest.mark.parametrize("prefix", ["transformer.", "base_model.model.", "lycoris_"])
def test_fused_projections(flux, tmp_path, block, name, parts, prefix):
    module, roles = f"{block}.{name}", ("lora_A", "lora_B")
    if prefix == "lycoris_":
        module, roles = module.replace(".", "_"), ("lora_down", "lora_up")
    keys = [f"{prefix}{module}.{role}.weight" for role in roles]
    adapter = assert_read_alike(flux, tmp_path, keys, [f"{block}.{part}" for part in parts])
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


@pytest.mark.parametrize(("module", "block", "parts"), DIFFSYNTH)
def test_diffsynth(flux, tmp_path, module, block, parts):
    keys = [f"{module}.lora_{x}.default.weight" for x in "AB"]
    adapter = assert_read_alike(flux, tmp_path, keys, [f"{block}.{part}" for part in parts])
    assert adapter.format == "bare keys, DiffSynth names, LoRA"


@pytest.mark.parametrize("name", MFLUX)
def test_mflux(flux, tmp_path, name):
    keys = [f"transformer.{DOUBLE}.{name}.lora_{x}" for x in "AB"]
    adapter = assert_read_alike(flux, tmp_path, keys, [f"{DOUBLE}.{MFLUX[name]}"])
    assert adapter.format == "diffusers keys, mflux names, LoRA"


@pytest.mark.parametrize(
    ("prefix", "component", "module"),
    [
        ("lora_transformer", "transformer", "transformer_blocks.0.attn.to_q"),
        ("lora_te1", "text_encoder", "encoder.layers.1.self_attn.q_proj"),
    ],
)
def test_loha_of_older_onetrainers(flux, tmp_path, prefix, component, module):
    """Their export to underscores took the last dot, before the role, but not that of alpha."""
    rows, columns = flux[component].get_submodule(module).weight.shape
    shapes = {"w1_a": (rows, RANK), "w1_b": (RANK, columns)}
    shapes |= {"w2_a": (rows, RANK), "w2_b": (RANK, columns)}
    tensors = {f"hada_{x}": random(*shape, seed=i) for i, (x, shape) in enumerate(shapes.items())}
    flat = f"{prefix}_{module.replace('.', '_')}"
    alpha = torch.tensor(3.0)
    old = {f"{flat}_{role}": t for role, t in tensors.items()} | {f"{flat}.alpha": alpha}
    new = {f"{component}.{module}.{role}": t for role, t in (tensors | {"alpha": alpha}).items()}
    adapter = tiny.load(tmp_path / "old", flux, old)
    expected = tiny.load(tmp_path / "new", flux, new)
    tiny.assert_same(tiny.deltas(adapter, flux), tiny.deltas(expected, flux))
    assert adapter.modules == 1
