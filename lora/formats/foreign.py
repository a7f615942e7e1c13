"""Files that are not FLUX.1 adapters, told apart by the names in their header.

A wrong file would fail anyway, on an unknown key or a shape. This table only lets the
message say what the file is, and it is read before any tensor.
"""

from collections.abc import Set

from lora.formats.errors import AdapterError
from lora.formats.keys import Targets
from lora.formats.kinds import flat_shape
from lora.formats.spellings import CLIP, T5, TRANSFORMER, is_embedding, split_role
from weights.header import Header, TensorInfo, short

NEEDED = "give a LoRA, DoRA, LoKr, LoHa, OFT, BOFT, GLoRA or full difference for FLUX.1 instead"
# (what one of the keys contains; what the file is; why it is not read)
KINDS = (
    (("vera_lambda_", "vera_A"), "a VeRA adapter", "which needs its trainer's random matrices"),
    (("lambda_layer", ".q_layer."), "a T-LoRA", "whose rank changes with the timestep"),
    ((".mlp_fc", "mlp_context_fc", ".qkv_proj"), "packed for nunchaku",
     "which only its kernels read, so that the file from which it was made is needed"),
    (("ip_adapter", "to_k_ip"), "an IP-Adapter", "which takes an image and has its own layers"),
    (("controlnet_", "input_hint_block"), "a ControlNet", "which is a model of its own"),
    (("oft_unet_",), "an OFT of sd-scripts", "whose blocks lie apart for q, k and v"),
    ((".ia3_l", ".on_input"), "an IA3", "which scales inputs or outputs, and has no loader here"),
    ((".boft_R", ".boft_s"), "a BOFT of PEFT",
     "which turns the inputs of modules; only that of LyCORIS is read"),
    (("redux_",), "FLUX.1 Redux", "which makes prompts from images"),
)  # fmt: skip
# Full models: how many times the channels of the base model's input they have; their name.
INPUTS = {2: "FLUX.1 Canny or Depth", 6: "FLUX.1 Fill"}
# Full models that differ from the base model in their values alone: named by the header, if at all.
TITLES = ("kontext", "krea")
TITLE_FIELDS = ("modelspec.title", "modelspec.architecture")
ARCHITECTURE_FIELDS = ("modelspec.architecture", "ss_base_model_version")
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
# Names that tools also give to FLUX.1's adapters: ai-toolkit wrote sd_1.5 for models that it had no
# name for, and sd-scripts' merges say stable-diffusion-v1. Their keys differ from those of FLUX.1.
MISNOMERS = frozenset({"Stable Diffusion 1.5", "Stable Diffusion 2", "Stable Diffusion XL"})
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
    _refuse_kind(header, targets)
    if any(key.startswith("decoder.") for key in header.tensors):
        raise AdapterError("this file is an autoencoder (VAE); an adapter (LoRA) is needed")
    model = _marked(header) or _architecture(header, targets)
    if model is not None:
        raise AdapterError(f"this file is for {model}; a FLUX.1 adapter is needed")
    _refuse_control(header, targets)
    if not _has_roles(header):
        _refuse_whole_model(header, targets)


def _refuse_kind(header: Header, targets: Targets) -> None:
    """Name adapters of a kind that is not read."""
    keys = _modules(header)
    for markers, kind, reason in KINDS:
        if any(marker in key for key in keys for marker in markers):
            raise AdapterError(f"this file is {kind}, {reason}; {NEEDED}")
    words = [targets.shape(CLIP, "embeddings.token_embedding"), targets.shape(T5, "shared")]
    widths = {shape[1] for shape in words if shape}
    tensors = header.tensors.items()
    if tensors and all(is_embedding(key) or _is_word(key, info, widths) for key, info in tensors):
        names = ", ".join(map(short, list(header.tensors)[:4]))
        raise AdapterError(
            f"this file is a textual inversion ({names}), embeddings of words, which are not read; "
            f"{NEEDED}"
        )


def _modules(header: Header) -> list[str]:
    """The keys, without those of embeddings, whose names are the words of a user."""
    return [key for key in header.tensors if not is_embedding(key)]


def _is_word(key: str, info: TensorInfo, widths: Set[int]) -> bool:
    """Whether a tensor is embeddings of the text encoders, under a name of its own."""
    return "." not in key and len(info.shape) in (1, 2) and info.shape[-1] in widths


def _refuse_control(header: Header, targets: Targets) -> None:
    """A Control LoRA widens the model's input, and stores norm scales instead of differences."""
    for key, info in header.tensors.items():
        spelling, role = split_role(key) or (key, "")
        found = targets.find(spelling)
        if found is None:
            continue
        target = found[1]
        is_input = target.pieces[0].module == "x_embedder" and target.component == TRANSFORMER
        columns = flat_shape(role, info.shape)[1:]
        widened = role == "down" and is_input and columns != target.shape[1:]
        if widened or (not role and key.endswith(".scale") and _has_roles(header)):
            raise AdapterError(
                "this file is a Control LoRA (canny, depth or the like), which changes the "
                f"model's inputs ({short(key)} is {info.shape}); it works only with its own "
                "pipeline. A style or subject adapter is needed."
            )


def _architecture(header: Header, targets: Targets) -> str | None:
    """The model that the header's metadata names, unless the keys show that this is a misnomer."""
    values = [header.metadata.get(field, "").lower() for field in ARCHITECTURE_FIELDS]
    named = [model for value in values for marker, model in ARCHITECTURES if marker in value]
    if _changes_transformer(header, targets):
        named = [model for model in named if model not in MISNOMERS]
    return named[0] if named else None


def _changes_transformer(header: Header, targets: Targets) -> bool:
    """Whether a key belongs to a module of FLUX.1's transformer; its CLIP has others' names."""
    spellings = (split_role(key) for key in header.tensors)
    found = (targets.find(spelling) for spelling, _ in filter(None, spellings))
    return any(target.component == TRANSFORMER for _, target in filter(None, found))


def _marked(header: Header) -> str | None:
    keys = _modules(header)
    return next((model for marker, model in MARKERS if any(marker in key for key in keys)), None)


def _refuse_whole_model(header: Header, targets: Targets) -> None:
    """Say what a file without any adapter key is, where its names tell."""
    for key in header.tensors:
        found = targets.find(key.rpartition(".")[0])
        if found is not None:
            part = found[1].component
            name = f"text encoder ({part})"
            if part == TRANSFORMER:
                name = _transformer(header, targets)
            raise AdapterError(f"this file is a full {name}, not an adapter of it; {NEEDED}")


def _transformer(header: Header, targets: Targets) -> str:
    """Which FLUX.1 a full model is: by the channels of its input, else by its header's title."""
    for key, info in header.tensors.items():
        found = targets.find(key.removesuffix(".weight"))
        if found and found[1].pieces[0].module == "x_embedder" and len(info.shape) == 2:
            times = info.shape[1] / found[1].shape[1]
            if times in INPUTS:
                return f"{INPUTS[int(times)]} model"
    title = " ".join(header.metadata.get(field, "") for field in TITLE_FIELDS).lower()
    name = next((name for name in TITLES if name in title), None)
    if name:
        return f"FLUX.1 {name.capitalize()} checkpoint"
    return "FLUX.1 checkpoint (dev, schnell, Krea or Kontext, which have the same layout)"


def _has_roles(header: Header) -> bool:
    return any(split_role(key) for key in header.tensors)
