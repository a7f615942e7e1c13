"""OFT, BOFT and GLoRA, whose differences are made from the base weight.

Expected values are the trainers' formulas written out as whole matrices in float64; for rotations
of inputs, PEFT's own layer as well.
"""

import pytest
import torch
from peft import OFTConfig, inject_adapter_in_model

from lora.formats import rotations
from tests.lora.adapters import (
    FUSED,
    FUSED_PARTS,
    PROJ,
    QKV,
    QKV_PARTS,
    TO_OUT,
    cayley,
    expect,
    load,
    packed,
    random,
    weights,
    width,
)
from tests.support import tiny

# A module as a trainer spells it, and the parameters that it is made of.
MODULES = {
    "one": (PROJ, (TO_OUT,)),
    "fused": (QKV, QKV_PARTS),
    "fused with the MLP": (FUSED, FUSED_PARTS),
    "a part": ("lycoris_transformer_blocks_0_attn_to_q", QKV_PARTS[:1]),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("count", [4, 6])
@pytest.mark.parametrize(("alpha", "rescaled"), [(None, False), (0.0, True), (0.01, False)])
def test_oft_turns_blocks_of_rows(flux, tmp_path, name, count, alpha, rescaled):
    """LyCORIS: W' = rescale * R^T W; alpha x rows limits the norm. Blocks may span q, k and v."""
    module, names = MODULES[name]
    weight = torch.cat(weights(flux, names))
    rows = weight.shape[0]
    count = count if rows % count == 0 else 4
    tensors = {"oft_blocks": 0.3 * random(count, rows // count, rows // count)}
    rescale = 1 + 0.2 * random(rows, 1)
    if alpha is not None:
        tensors["alpha"] = torch.tensor(alpha)
    if rescaled:
        tensors["rescale"] = rescale
    limit = alpha * rows if alpha else float("inf")
    rotation = torch.block_diag(*cayley(tensors["oft_blocks"], limit)).T
    turned = rotation @ weight * (rescale.double() if rescaled else 1.0)
    adapter = load(flux, tmp_path, module, tensors)
    expect(flux, adapter, turned - weight, names)
    assert adapter.format.endswith(" names, OFT")


def test_oft_of_large_values_keeps_its_digits(flux, tmp_path):
    """The inverse loses as many as they are large."""
    [weight] = weights(flux, [TO_OUT])
    rows = weight.shape[0]
    size = 3 if rows % 3 == 0 else 4
    blocks = 1e5 * random(rows // size, size, size)
    adapter = load(flux, tmp_path, PROJ, {"oft_blocks": blocks})
    rotation = torch.block_diag(*cayley(blocks)).T
    expect(flux, adapter, rotation @ weight - weight, [TO_OUT])


def butterfly(blocks, rows):
    """B_m ... B_1 as one matrix: factor i turns row c k 2 + g k + j as row c k 2 + 2 j + g."""
    whole = torch.eye(rows, dtype=torch.float64)
    for index, turn in enumerate(cayley(blocks)):
        half = blocks.shape[-1] // 2 * 2**index
        order = [
            c + g * half + j for c in range(0, rows, 2 * half) for j in range(half) for g in (0, 1)
        ]
        permutation = torch.eye(rows, dtype=torch.float64)[order]
        whole = permutation.T @ torch.block_diag(*turn) @ permutation @ whole
    return whole


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("factors", [1, 3])
@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("at_a_time", [7, 512])
def test_boft_turns_rows_by_butterfly_factors(
    flux, tmp_path, monkeypatch, name, factors, rescaled, at_a_time
):
    monkeypatch.setattr(rotations, "COLUMNS", at_a_time)
    module, names = MODULES[name]
    weight = torch.cat(weights(flux, names))
    rows = weight.shape[0]
    count = 4
    tensors = {"oft_blocks": 0.3 * random(factors, count, rows // count, rows // count)}
    rescale = 1 + 0.2 * random(rows, 1)
    if rescaled:
        tensors["rescale"] = rescale
    turned = butterfly(tensors["oft_blocks"], rows) @ weight
    turned = turned * (rescale.double() if rescaled else 1.0)
    adapter = load(flux, tmp_path, module, tensors)
    expect(flux, adapter, turned - weight, names)
    assert adapter.format.endswith(" names, BOFT")


def test_the_constraint_of_boft_is_on_all_factors_together(flux, tmp_path):
    [weight] = weights(flux, [TO_OUT])
    rows = weight.shape[0]
    blocks = random(2, 4, rows // 4, rows // 4)
    adapter = load(flux, tmp_path, PROJ, {"oft_blocks": blocks, "alpha": torch.tensor(0.02)})
    skew = blocks.double() - blocks.double().transpose(-1, -2)
    limited = blocks.double() * (0.02 * rows / skew.norm())
    expect(flux, adapter, butterfly(limited, rows) @ weight - weight, [TO_OUT])


def series(values, size):
    """PEFT's R: I + 2 Q + 2 Q^2 + 2 Q^3 + Q^4, of Q with these values above its diagonal."""
    matrices = []
    for row in values.double():
        above = torch.zeros(size, size, dtype=torch.float64)
        above[*torch.triu_indices(size, size, 1)] = row
        q = above - above.T
        eye = torch.eye(size, dtype=torch.float64)
        matrices.append(eye + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q)
    return matrices


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("scaled", [None, torch.tensor(1), torch.ones(1)])
def test_oft_of_peft_turns_blocks_of_columns(flux, tmp_path, name, shared, scaled):
    module, names = MODULES[name]
    weight = torch.cat(weights(flux, names))
    columns, count = weight.shape[1], 4
    values = packed(columns, count, shared)
    tensors = {"oft_R.weight": values}
    if scaled is not None:
        tensors["oft_R.scaled_oft"] = scaled
        values = values / values.shape[1] ** 0.5
    blocks = series(values, columns // count) * (count if shared else 1)
    turned = weight @ torch.block_diag(*blocks).T
    adapter = load(flux, tmp_path, module, tensors)
    expect(flux, adapter, turned - weight, names)
    assert adapter.format.endswith(" names, OFT of inputs")


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.filterwarnings("ignore")  # PEFT has some of its own
def test_oft_gives_the_weights_that_peft_merges(flux, tmp_path, shared):
    """PEFT's own layer in a module of the model, trained or not, and merged by PEFT."""
    module = torch.nn.ModuleDict({"to_q": torch.nn.Linear(width(flux), width(flux))})
    base = flux["transformer"].transformer_blocks[0].attn.to_q.weight.detach()
    module["to_q"].weight.data.copy_(base)
    config = OFTConfig(
        r=4, oft_block_size=0, target_modules=["to_q"], init_weights=False, block_share=shared
    )
    layer = inject_adapter_in_model(config, module)["to_q"]
    values = layer.oft_R["default"].weight.detach()
    layer.merge(safe_merge=True)
    key = "base_model.model.transformer_blocks.0.attn.to_q.oft_R.default.weight"
    adapter = tiny.load(tmp_path / "a", flux, {key: values})
    [ours] = tiny.deltas(adapter, flux).values()
    merged = layer.get_base_layer().weight.detach()
    assert not torch.equal(merged, base)
    torch.testing.assert_close(base + ours, merged, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("old", [False, True])
def test_glora_adds_to_the_weight_and_to_its_inputs(flux, tmp_path, name, old):
    """LyCORIS: W' = W + alpha / rank (W a1 a2 + b1 b2); its first versions swap 1 and 2."""
    module, names = MODULES[name]
    weight = torch.cat(weights(flux, names))
    (rows, columns), rank, alpha = weight.shape, 2, 3.0
    a1, a2, b1, b2 = (
        random(*shape, seed=seed)
        for seed, shape in enumerate(
            [(columns, rank), (rank, columns), (rows, rank), (rank, columns)]
        )
    )
    roles = ("a2", "a1", "b2", "b1") if old else ("a1", "a2", "b1", "b2")
    tensors = {f"{r}.weight": t for r, t in zip(roles, (a1, a2, b1, b2), strict=True)}
    tensors["alpha"] = torch.tensor(alpha)
    adapter = load(flux, tmp_path, module, tensors)
    dense = weight @ a1.double() @ a2.double() + b1.double() @ b2.double()
    expect(flux, adapter, alpha / rank * dense, names)
    assert adapter.format.endswith("old GLoRA" if old else " names, GLoRA")
