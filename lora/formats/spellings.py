"""How trainers write names and roles: the tables behind `lora/formats/keys.py`.

Every row is data. A new spelling is a new row; nothing here looks at a model.
"""

import re
from dataclasses import dataclass

TRANSFORMER, CLIP, T5 = "transformer", "text_encoder", "text_encoder_2"
CLIP_LEVEL = "text_model."  # of CLIP's modules, which transformers 5 dropped

# BFL name -> diffusers names whose output rows it fuses, in order.
IMAGE_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
TEXT_QKV = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
BFL_TOP = (
    ("img_in", ("x_embedder",)),
    ("img_in.proj", ("x_embedder",)),
    ("txt_in", ("context_embedder",)),
    ("time_in.in_layer", ("time_text_embed.timestep_embedder.linear_1",)),
    ("time_in.out_layer", ("time_text_embed.timestep_embedder.linear_2",)),
    ("vector_in.in_layer", ("time_text_embed.text_embedder.linear_1",)),
    ("vector_in.out_layer", ("time_text_embed.text_embedder.linear_2",)),
    ("guidance_in.in_layer", ("time_text_embed.guidance_embedder.linear_1",)),
    ("guidance_in.out_layer", ("time_text_embed.guidance_embedder.linear_2",)),
    ("final_layer.linear", ("proj_out",)),
)
BFL_SHIFT_SCALE = ("final_layer.adaLN_modulation.1", "norm_out.linear")
BFL_DOUBLE = (
    ("img_attn.qkv", IMAGE_QKV),
    ("txt_attn.qkv", TEXT_QKV),
    ("img_attn.proj", ("attn.to_out.0",)),
    ("txt_attn.proj", ("attn.to_add_out",)),
    ("img_mlp.0", ("ff.net.0.proj",)),
    ("img_mlp.2", ("ff.net.2",)),
    ("txt_mlp.0", ("ff_context.net.0.proj",)),
    ("txt_mlp.2", ("ff_context.net.2",)),
    ("img_mod.lin", ("norm1.linear",)),
    ("txt_mod.lin", ("norm1_context.linear",)),
    ("img_attn.norm.query_norm", ("attn.norm_q",)),
    ("img_attn.norm.key_norm", ("attn.norm_k",)),
    ("txt_attn.norm.query_norm", ("attn.norm_added_q",)),
    ("txt_attn.norm.key_norm", ("attn.norm_added_k",)),
)
BFL_SINGLE = (
    ("linear1", (*IMAGE_QKV, "proj_mlp")),
    ("linear2", ("proj_out",)),
    ("modulation.lin", ("norm.linear",)),
    ("norm.query_norm", ("attn.norm_q",)),
    ("norm.key_norm", ("attn.norm_k",)),
)
XLABS_DOUBLE = (
    ("processor.qkv_lora1", IMAGE_QKV),
    ("processor.qkv_lora2", TEXT_QKV),
    ("processor.proj_lora1", ("attn.to_out.0",)),
    ("processor.proj_lora2", ("attn.to_add_out",)),
)
BEFORE_PEFT = (
    ("attn.processor.to_q_lora", ("attn.to_q",)),
    ("attn.processor.to_k_lora", ("attn.to_k",)),
    ("attn.processor.to_v_lora", ("attn.to_v",)),
)
BEFORE_PEFT_DOUBLE = (
    *BEFORE_PEFT,
    ("attn.processor.to_out_lora", ("attn.to_out.0",)),
    ("attn.processor.add_q_proj_lora", ("attn.add_q_proj",)),
    ("attn.processor.add_k_proj_lora", ("attn.add_k_proj",)),
    ("attn.processor.add_v_proj_lora", ("attn.add_v_proj",)),
    ("attn.processor.to_add_out_lora", ("attn.to_add_out",)),
)
XLABS_SINGLE = (("processor.qkv_lora", IMAGE_QKV), ("processor.proj_lora", ("proj_out",)))
# diffusers' `fuse_projections`, with which SimpleTuner trains, and SimpleTuner's own name.
FUSED_SINGLE = (("attn.to_qkv", IMAGE_QKV),)
FUSED_DOUBLE = (
    *FUSED_SINGLE,
    ("attn.to_added_qkv", TEXT_QKV),
    ("attn.add_qkv_proj", TEXT_QKV),
)
# DiffSynth-Studio renames BFL's modules and leaves their rows in BFL's order.
DIFFSYNTH_DOUBLE = (
    ("attn.a_to_qkv", IMAGE_QKV),
    ("attn.b_to_qkv", TEXT_QKV),
    ("attn.a_to_out", ("attn.to_out.0",)),
    ("attn.b_to_out", ("attn.to_add_out",)),
    ("ff_a.0", ("ff.net.0.proj",)),
    ("ff_a.2", ("ff.net.2",)),
    ("ff_b.0", ("ff_context.net.0.proj",)),
    ("ff_b.2", ("ff_context.net.2",)),
    ("norm1_a.linear", ("norm1.linear",)),
    ("norm1_b.linear", ("norm1_context.linear",)),
)
DIFFSYNTH_SINGLE = (
    ("to_qkv_mlp", (*IMAGE_QKV, "proj_mlp")),
    ("proj_out", ("proj_out",)),
    ("norm.linear", ("norm.linear",)),
)
MFLUX_DOUBLE = (
    ("ff.linear1", ("ff.net.0.proj",)),
    ("ff.linear2", ("ff.net.2",)),
    ("ff_context.linear1", ("ff_context.net.0.proj",)),
    ("ff_context.linear2", ("ff_context.net.2",)),
)
# Rows of (spelled prefix, model prefix, naming, table) for the two kinds of block.
BLOCKS = (
    ("double_blocks", "transformer_blocks", "BFL", BFL_DOUBLE),
    ("single_blocks", "single_transformer_blocks", "BFL", BFL_SINGLE),
    ("double_blocks", "transformer_blocks", "XLabs", XLABS_DOUBLE),
    ("single_blocks", "single_transformer_blocks", "XLabs", XLABS_SINGLE),
    ("transformer_blocks", "transformer_blocks", "diffusers before PEFT", BEFORE_PEFT_DOUBLE),
    ("single_transformer_blocks", "single_transformer_blocks", "diffusers before PEFT",
     BEFORE_PEFT),
    ("transformer_blocks", "transformer_blocks", "fused diffusers", FUSED_DOUBLE),
    ("single_transformer_blocks", "single_transformer_blocks", "fused diffusers", FUSED_SINGLE),
    ("blocks", "transformer_blocks", "DiffSynth", DIFFSYNTH_DOUBLE),
    ("single_blocks", "single_transformer_blocks", "DiffSynth", DIFFSYNTH_SINGLE),
    ("transformer_blocks", "transformer_blocks", "mflux", MFLUX_DOUBLE),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Dialect:
    """How a trainer turns a module's name into a key: a prefix, and dots or underscores."""

    prefix: str
    component: str
    joined: bool
    label: str


DIALECTS = (
    Dialect("transformer.", TRANSFORMER, False, "diffusers"),
    Dialect("diffusion_model.", TRANSFORMER, False, "ComfyUI"),
    Dialect("model.diffusion_model.", TRANSFORMER, False, "ComfyUI"),
    Dialect("base_model.model.", TRANSFORMER, False, "PEFT"),
    Dialect("base_model.model.transformer.", TRANSFORMER, False, "PEFT"),
    Dialect("transformer.base_model.model.", TRANSFORMER, False, "PEFT"),
    Dialect("unet.", TRANSFORMER, False, "diffusers"),
    Dialect("unet.base_model.model.", TRANSFORMER, False, "PEFT"),
    Dialect("", TRANSFORMER, False, "bare"),
    Dialect("lora_unet_", TRANSFORMER, True, "kohya"),
    Dialect("lora_unet__", TRANSFORMER, True, "kohya"),
    Dialect("lora_transformer_", TRANSFORMER, True, "OneTrainer"),
    Dialect("lycoris_", TRANSFORMER, True, "LyCORIS"),
    Dialect("text_encoder.", CLIP, False, "diffusers"),
    Dialect("text_encoders.clip_l.transformer.", CLIP, False, "ComfyUI"),
    Dialect("clip_l.", CLIP, False, "OneTrainer"),
    Dialect("lora_te1_", CLIP, True, "kohya"),
    Dialect("lora_te_", CLIP, True, "kohya"),
    Dialect("lora_te1.", CLIP, False, "ai-toolkit"),
    Dialect("lora_clip_", CLIP, True, "invoke-training"),
    Dialect("text_encoder_2.", T5, False, "diffusers"),
    Dialect("text_encoders.t5xxl.transformer.", T5, False, "ComfyUI"),
    Dialect("t5.", T5, False, "OneTrainer"),
    Dialect("lora_te3_", T5, True, "kohya"),
    Dialect("lora_te2_", T5, True, "OneTrainer"),
    Dialect("lora_t5_", T5, True, "invoke-training"),
)

SUFFIXES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("down", ("lora_A.weight", "lora_down.weight", "lora.down.weight", "down.weight", "lora_A",
              "lora_linear_layer.down.weight")),
    ("up", ("lora_B.weight", "lora_up.weight", "lora.up.weight", "up.weight", "lora_B",
            "lora_linear_layer.up.weight")),
    ("up_bias", ("lora_B.bias", "lora_up.bias")),
    ("alpha", ("alpha",)),
    ("magnitude", ("dora_scale", "magnitude", "lora_magnitude_vector.weight",
                   "lora_magnitude_vector")),
    *((f"glora_{name}", (f"{name}.weight",)) for name in ("a1", "a2", "b1", "b2")),
    ("oft_blocks", ("oft_blocks",)),
    ("rescale", ("rescale",)),
    ("oft_R", ("oft_R.weight",)),
    ("oft_scaled", ("oft_R.scaled_oft",)),
    ("diff", ("diff", "w_norm")),
    ("diff_b", ("diff_b", "b_norm")),
    *((f"lokr_{name}", (f"lokr_{name}",))
      for name in ("w1", "w2", "w1_a", "w1_b", "w2_a", "w2_b", "t2")),
    *((f"hada_{name}", (f"hada_{name}",)) for name in ("w1_a", "w1_b", "w2_a", "w2_b")),
)  # fmt: skip
ROLES = {suffix: role for role, suffixes in SUFFIXES for suffix in suffixes}
LONGEST_ROLE = max(suffix.count(".") for suffix in ROLES) + 1
# Modules under which PEFT inserts the adapter's name: `lora_A.default.weight`.
PEFT_NAMED = frozenset({"lora_A", "lora_B", "lora_magnitude_vector", "oft_R"})
UNDOTTED_LOHA = re.compile(r"_(hada_w[12]_[ab])$")  # of older OneTrainers

BOOKKEEPING = frozenset({"step", "epoch", "iteration", "global_step"})  # of trainers, one number
AUXILIARY = "_aux."  # what tools for sliders add, under hashes; no part of a module
EMBEDDINGS = frozenset({"clip_l", "clip_g", "t5", "t5xxl", "emb_params"})
EMBEDDING_PREFIXES = ("bundle_emb.", "string_to_param.")


def is_embedding(key: str) -> bool:
    """Whether a key is that of embeddings of words (textual inversion), not of a module."""
    return key in EMBEDDINGS or key.startswith(EMBEDDING_PREFIXES)


def split_role(key: str) -> tuple[str, str] | None:
    """Split a key into (module spelling, role); None when it ends in no known role."""
    parts = UNDOTTED_LOHA.sub(r".\1", key).split(".")
    if len(parts) > 2 and parts[-1] in ("weight", "bias") and parts[-3] in PEFT_NAMED:
        del parts[-2]
    for count in range(LONGEST_ROLE, 0, -1):
        role = ROLES.get(".".join(parts[-count:]))
        if role is not None and len(parts) > count:
            return ".".join(parts[:-count]), role
    return None
