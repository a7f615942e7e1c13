"""The official files as data: which repositories, which of their files, under which licence.

Patterns are fnmatch's, in which `*` also matches a slash; each must match a file, or the revision
is not what is expected. `transformer/*` leaves out the single-file checkpoint at the root, which
holds the same weights again. schnell brings its transformer alone: its VAE, text encoders and
tokenizers are those of dev.

The hub could not be asked where this was developed. That these revisions exist and hold the files
is shown by public code that uses them:
    dev         the log of FastVideo's layer comparison loads the three shards of the transformer
                from this commit (flux1_dit.py of hao-ai-lab/FastVideo)
    schnell     the README of the FLUX.1 server in nod-ai/shark-ai names this commit's snapshot
    falconsai   scripts/ai/export-nsfw-models.py of photoprism/photoprism loads model.safetensors
                from this commit
    compvis     version.py of replicate/cog-stable-diffusion says that refs/pr/41 is a conversion
                to fp16 safetensors; the main branch is known to hold pytorch_model.bin. A pull
                request can be changed, so the file is pinned by its SHA-256 too: the one that a Nix
                package of Acly/comfyui-tooling-nodes gives for it, and that others give for
                safety_checker/model.fp16.safetensors of Stable Diffusion 1.5
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Repository:
    """A repository of the Hugging Face hub, and what is wanted of it.

    Attributes:
        part: where it lies in a checkpoint directory.
        revision: unless the settings name another.
        sha256: of files that are pinned beyond a revision that can change; lower-case hex.
        remedy: what else to do if the repository cannot be fetched.
    """

    part: str
    title: str
    name: str
    files: tuple[str, ...]
    licence: str
    revision: str
    sha256: Mapping[str, str] = field(default_factory=dict)
    remedy: str = ""

    @property
    def short(self) -> str:
        """The name that the setting of revisions uses, such as `compvis`."""
        return self.part.rpartition("/")[2]


CLASSIFIER_FILES = ("config.json", "preprocessor_config.json", "model.safetensors")
WITHOUT_CHECKERS = "Set FLUX_SAFETY_POLICY=open_nsfw for the checker that needs no download."

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
            revision="3de623fc3c33e44ffbe2bad470d0f45bccf2eb21",
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
            revision="741f7c3ce8b383c54771c7003378a50191e9efe9",
        ),
        Repository(
            part="safety/compvis",
            title="CompVis safety checker",
            name="CompVis/stable-diffusion-safety-checker",
            files=CLASSIFIER_FILES,
            licence="see its model card",
            revision="refs/pr/41",
            sha256={
                "model.safetensors": (
                    "08902f19b1cfebd7c989f152fc0507bef6898c706a91d666509383122324b511"
                )
            },
            remedy=WITHOUT_CHECKERS,
        ),
        Repository(
            part="safety/falconsai",
            title="Falconsai NSFW detector",
            name="Falconsai/nsfw_image_detection",
            files=CLASSIFIER_FILES,
            licence="Apache-2.0",
            revision="04367978d3474804ab1a00a9bd6548b741764069",
            remedy=WITHOUT_CHECKERS,
        ),
    )
}
