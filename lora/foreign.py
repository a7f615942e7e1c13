"""Files that are not FLUX.1 adapters, told apart by the names in their header.

A wrong file would fail anyway, on an unknown key or a shape. This table only lets the
message say what the file is, and it is read before any tensor.
"""

from collections.abc import Mapping

from lora.header import AdapterError, Header, short
from lora.keys import Targets
from lora.spellings import TRANSFORMER, split_role

_ARCHITECTURE_FIELDS = ("modelspec.architecture", "ss_base_model_version")
# (what the field contains, in lower case; the model's name)
ARCHITECTURES = (
    ("stable-diffusion-xl", "Stable Diffusion XL"),
    ("sdxl", "Stable Diffusion XL"),
    ("stable-diffusion-v1", "Stable Diffusion 1.5"),
    ("sd_v1", "Stable Diffusion 1.5"),
    ("sd_1", "Stable Diffusion 1.5"),
    ("stable-diffusion-v2", "Stable Diffusion 2"),
    ("sd_v2", "Stable Diffusion 2"),
    ("stable-diffusion-3", "Stable Diffusion 3"),
    ("sd3", "Stable Diffusion 3"),
    ("flux-2", "FLUX.2"),
    ("flux.2", "FLUX.2"),
    ("flux2", "FLUX.2"),
    ("chroma", "Chroma"),
    ("hunyuan", "HunyuanVideo"),
    ("qwen", "Qwen-Image"),
    ("lumina", "Lumina"),
    ("wan2", "Wan"),
)
# (what a key contains; the model's name). None of these occurs in a FLUX.1 adapter.
MARKERS = (
    ("lora_te2_text_model", "Stable Diffusion XL"),
    ("text_encoder_2.text_model", "Stable Diffusion XL"),
    ("add_embedding", "Stable Diffusion XL"),
    ("down_blocks", "Stable Diffusion 1.5, 2 or XL"),
    ("input_blocks", "Stable Diffusion 1.5, 2 or XL"),
    ("mid_block", "Stable Diffusion 1.5, 2 or XL"),
    ("joint_blocks", "Stable Diffusion 3"),
    ("double_stream_modulation", "FLUX.2"),
    ("single_stream_modulation", "FLUX.2"),
    ("to_qkv_mlp_proj", "FLUX.2"),
    ("distilled_guidance_layer", "Chroma"),
    (".img_attn_qkv", "HunyuanVideo"),
    ("img_mod.1.", "Qwen-Image"),
    ("img_mod_1.", "Qwen-Image"),
    ("noise_refiner", "Lumina or Z-Image"),
    ("cross_attn", "Wan"),
    ("scale_shift_table", "LTX-Video or PixArt"),
)


def refuse_foreign(header: Header, targets: Targets) -> None:
    """Raise an AdapterError that names the file if it is known not to be a FLUX.1 adapter."""
    _refuse_control(header, targets)
    if any(key.startswith("decoder.") for key in header.tensors):
        raise AdapterError("this file is an autoencoder (VAE); an adapter (LoRA) is needed")
    model = _architecture(header.metadata) or _marked(header)
    if model is not None:
        raise AdapterError(f"this file is for {model}; a FLUX.1 adapter is needed")
    if not _has_roles(header):
        _refuse_whole_model(header, targets)


def _refuse_control(header: Header, targets: Targets) -> None:
    """A Control LoRA widens the model's input, and stores norm scales instead of differences."""
    for key, info in header.tensors.items():
        spelling, role = split_role(key) or (key, "")
        found = targets.find(spelling)
        if found is None:
            continue
        place = found[1]
        is_input = place.pieces[0].module == "x_embedder" and place.component == TRANSFORMER
        widened = role == "down" and is_input and info.shape[1:] != place.shape[1:]
        if widened or (not role and key.endswith(".scale") and _has_roles(header)):
            raise AdapterError(
                "this file is a Control LoRA (canny, depth or the like), which changes the "
                f"model's inputs ({short(key)} is {info.shape}); it works only with its own "
                "pipeline. A style or subject adapter is needed."
            )


def _architecture(metadata: Mapping[str, str]) -> str | None:
    for field in _ARCHITECTURE_FIELDS:
        value = metadata.get(field, "").lower()
        for marker, model in ARCHITECTURES:
            if marker in value:
                return model
    return None


def _marked(header: Header) -> str | None:
    return next(
        (model for marker, model in MARKERS if any(marker in key for key in header.tensors)), None
    )


def _refuse_whole_model(header: Header, targets: Targets) -> None:
    """Say what a file without any adapter key is, where its names tell."""
    for key in header.tensors:
        found = targets.find(key.rpartition(".")[0])
        if found is not None:
            part = found[1].component
            what = "FLUX.1 checkpoint" if part == TRANSFORMER else f"text encoder ({part})"
            raise AdapterError(f"this file is a full {what}; an adapter (LoRA) is needed")


def _has_roles(header: Header) -> bool:
    return any(split_role(key) for key in header.tensors)
