"""The tables of names follow the model, whatever its size."""

import pytest

from lora.formats.keys import Piece, Targets
from lora.formats.spellings import DIALECTS, split_role
from tests.support import tiny

TOP = (
    "img_in",
    "txt_in",
    "time_in.in_layer",
    "time_in.out_layer",
    "vector_in.in_layer",
    "vector_in.out_layer",
    "guidance_in.in_layer",
    "guidance_in.out_layer",
    "final_layer.linear",
    "final_layer.adaLN_modulation.1",
)
DOUBLE = tuple(
    f"{stream}_{name}"
    for stream in ("img", "txt")
    for name in (
        "attn.qkv",
        "attn.proj",
        "mlp.0",
        "mlp.2",
        "mod.lin",
        "attn.norm.query_norm",
        "attn.norm.key_norm",
    )
)
SINGLE = ("linear1", "linear2", "modulation.lin", "norm.query_norm", "norm.key_norm")


@pytest.fixture(params=tiny.SIZES, ids=str, scope="module")
def size(request):
    return request.param


@pytest.fixture(scope="module")
def shapes(size):
    return tiny.shapes(tiny.modules(size))


@pytest.fixture(scope="module")
def targets(shapes):
    return Targets(shapes)


def test_every_module_is_found_under_every_dialect(shapes, targets):
    for dialect in DIALECTS:
        for parameter, shape in shapes[dialect.component].items():
            name = parameter.removesuffix(".weight")
            if name == parameter:
                continue
            spelling = name.replace(".", "_") if dialect.joined else name
            found = targets.find(dialect.prefix + spelling)
            assert found is not None, dialect.prefix + spelling
            assert found[0].component == dialect.component
            assert found[1].shape == tuple(shape)
            assert [piece.module for piece in found[1].pieces] == [name]


def test_underscored_names_do_not_collide(shapes):
    for parameters in shapes.values():
        names = [name for name in parameters if name.endswith(".weight")]
        assert len({name.replace(".", "_") for name in names}) == len(names)


def test_every_transformer_module_has_a_bfl_name(shapes, targets, size):
    spelled = list(TOP)
    spelled += [f"double_blocks.{i}.{name}" for i in range(size.double) for name in DOUBLE]
    spelled += [f"single_blocks.{i}.{name}" for i in range(size.single) for name in SINGLE]
    reached = set()
    for name in spelled:
        dotted, joined = targets.find(name), targets.find("lora_unet_" + name.replace(".", "_"))
        assert dotted is not None, name
        assert joined is not None, name
        assert joined[1] == dotted[1]
        reached |= {piece.module for piece in dotted[1].pieces}
    modules = {name.removesuffix(".weight") for name in shapes["transformer"] if "weight" in name}
    assert reached == modules


BEFORE_PEFT = {
    "to_q_lora": "to_q",
    "to_k_lora": "to_k",
    "to_v_lora": "to_v",
    "to_out_lora": "to_out.0",
    "add_q_proj_lora": "add_q_proj",
    "add_k_proj_lora": "add_k_proj",
    "add_v_proj_lora": "add_v_proj",
    "to_add_out_lora": "to_add_out",
}


def test_the_attention_of_diffusers_before_peft(targets):
    for spelling, name in BEFORE_PEFT.items():
        found = targets.find(f"transformer.transformer_blocks.0.attn.processor.{spelling}")
        assert found is not None
        assert [piece.module for piece in found[1].pieces] == [f"transformer_blocks.0.attn.{name}"]
        single = targets.find(f"single_transformer_blocks.1.attn.processor.{spelling}")
        assert (single is not None) == (name in ("to_q", "to_k", "to_v"))


def test_fused_rows_follow_the_models_own_width(targets, size):
    width = size.width
    target = targets.find("single_blocks.1.linear1")[1]
    assert target.shape == (7 * width, width)
    assert [piece.source for piece in target.pieces] == [
        slice(0, width),
        slice(width, 2 * width),
        slice(2 * width, 3 * width),
        slice(3 * width, 7 * width),
    ]


def test_the_last_modulation_swaps_its_halves(targets, size):
    target = targets.find("lora_unet_final_layer_adaLN_modulation_1")[1]
    low, high = slice(0, size.width), slice(size.width, 2 * size.width)
    assert target.pieces == (
        Piece("norm_out.linear", high, low),
        Piece("norm_out.linear", low, high),
    )


@pytest.mark.parametrize(
    "spelling",
    [
        "transformer_blocks.99.attn.to_q",
        "double_blocks.0.img_attn.qkvv",
        "lora_unet_double_blocks_0",
        "text_encoder.encoder.layers.7.mlp.fc1",
        "",
        "transformer.",
    ],
)
def test_a_name_that_is_not_the_models_is_not_found(targets, spelling):
    assert targets.find(spelling) is None


def test_schnell_lacks_the_guidance_embedder():
    schnell = tiny.Size(1, 1, 2, (4, 6, 6), guidance=False)
    targets = Targets(tiny.shapes(tiny.modules(schnell)))
    for spelling in (
        "lora_unet_guidance_in_in_layer",
        "transformer.time_text_embed.guidance_embedder.linear_2",
    ):
        assert targets.find(spelling) is None
        assert targets.is_absent(spelling)
    assert not targets.is_absent("lora_unet_double_blocks_7_img_attn_qkv")


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("a.b.lora_A.weight", ("a.b", "down")),
        ("a.b.lora_A.default.weight", ("a.b", "down")),
        ("a.b.lora_A.default_1.weight", ("a.b", "down")),
        ("a.b.lora.up.weight", ("a.b", "up")),
        ("a.b_lora1.up.weight", ("a.b_lora1", "up")),
        ("a.b.lora_linear_layer.down.weight", ("a.b", "down")),
        ("a.b.lora_linear_layer.up.weight", ("a.b", "up")),
        ("a.lora_B.bias", ("a", "up_bias")),
        ("a.lora_magnitude_vector.default.weight", ("a", "magnitude")),
        ("a.lora_magnitude_vector", ("a", "magnitude")),
        ("a.dora_scale", ("a", "magnitude")),
        ("a.w_norm", ("a", "diff")),
        ("a.weight", None),
        ("alpha", None),
        ("", None),
    ],
)
def test_roles(key, expected):
    assert split_role(key) == expected
