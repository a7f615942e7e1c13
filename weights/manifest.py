"""The official files as data: which repositories, which of their files, under which licence.

Patterns are fnmatch's, in which `*` also matches a slash; each must match a file, or the revision
is not what is expected. `transformer/*` leaves out the single-file checkpoint at the root, which
holds the same weights again. schnell brings its transformer alone: its VAE, text encoders and
tokenizers are those of dev.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Repository:
    """A repository of the Hugging Face hub, and what is wanted of it.

    part: where it lies in a checkpoint directory. revision_setting: name of the field of Settings
    that pins it, and variable, its environment variable.
    """

    part: str
    title: str
    name: str
    files: tuple[str, ...]
    licence: str
    revision_setting: str
    variable: str


_CLASSIFIER_FILES = ("config.json", "preprocessor_config.json", "model.safetensors")

REPOSITORIES = {
    repository.part: repository
    for repository in (
        Repository(
            part="dev",
            title="FLUX.1 [dev]",
            name="black-forest-labs/FLUX.1-dev",
            files=(
                "model_index.json",
                "scheduler/*.json",
                "text_encoder/*.json",
                "text_encoder/*.safetensors",
                "text_encoder_2/*.json",
                "text_encoder_2/*.safetensors",
                "tokenizer/*",
                "tokenizer_2/*",
                "transformer/*.json",
                "transformer/*.safetensors",
                "vae/*.json",
                "vae/*.safetensors",
            ),
            licence="FLUX.1 [dev] Non-Commercial License",
            revision_setting="dev_revision",
            variable="FLUX_DEV_REVISION",
        ),
        Repository(
            part="schnell",
            title="FLUX.1 [schnell]",
            name="black-forest-labs/FLUX.1-schnell",
            files=(
                "model_index.json",
                "scheduler/*.json",
                "transformer/*.json",
                "transformer/*.safetensors",
            ),
            licence="Apache-2.0",
            revision_setting="schnell_revision",
            variable="FLUX_SCHNELL_REVISION",
        ),
        Repository(
            part="safety/compvis",
            title="CompVis safety checker",
            name="CompVis/stable-diffusion-safety-checker",
            files=_CLASSIFIER_FILES,
            licence="see its model card",
            revision_setting="compvis_revision",
            variable="FLUX_COMPVIS_REVISION",
        ),
        Repository(
            part="safety/falconsai",
            title="Falconsai NSFW detector",
            name="Falconsai/nsfw_image_detection",
            files=_CLASSIFIER_FILES,
            licence="Apache-2.0",
            revision_setting="falconsai_revision",
            variable="FLUX_FALCONSAI_REVISION",
        ),
    )
}
