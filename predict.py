"""The public contract: Cog's signature, and the stages that a request passes through.

The only module that imports cog. Cog reads this file without running it and resolves
just a few forms: literals, and names bound to one literal in this file. Anything else
is dropped without a word, so the signature below stays in those forms
(tests/predictor/test_contract.py checks them on the syntax tree).
"""
# ruff: noqa: E501  (a description must be one plain string literal)

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING
from urllib.parse import clear_cache  # type: ignore[attr-defined]

from cog import BaseRunner, Input, Path

from flux.request import Inputs, Request, make_request, scale_multiplier
from flux.sampling import MEGAPIXEL
from lora.loader import AdapterLoader
from lora.settings import LoaderSettings
from safety.checker import Inspection
from safety.policy import load_checker, parts_of
from weights.serving.cancel import CheckCancelled
from weights.serving.inputs import InputFiles
from weights.serving.inventory import Inventory
from weights.serving.outputs import Outputs, RequestOutputs
from weights.serving.quiet import importing_libraries
from weights.serving.settings import Settings
from weights.serving.timing import Stopwatch
from weights.serving.worker import EngineThread

if TYPE_CHECKING:
    from lora.formats.adapter import Adapter

logger = logging.getLogger(__name__)

ASPECT_RATIOS = [
    "1:1",
    "16:9",
    "21:9",
    "3:2",
    "2:3",
    "4:5",
    "5:4",
    "3:4",
    "4:3",
    "9:16",
    "9:21",
    "custom",
]
LORA_DESCRIPTION = "Load LoRA weights. Supports Replicate models in the format <owner>/<username> or <owner>/<username>/<version>, HuggingFace URLs in the format huggingface.co/<owner>/<model-name>, CivitAI URLs in the format civitai.com/models/<id>[/<model-name>], or arbitrary .safetensors URLs from the Internet. For example, 'fofr/flux-pixar-cars'"


class Predictor(BaseRunner):
    """FLUX.1 [dev] and [schnell]; loaded once, then one request at a time."""

    def setup(self, weights: str | None = None) -> None:
        """Load everything, in the thread that will serve every request.

        Args:
            weights: what COG_WEIGHTS holds, a reference like those of `replicate_weights`: the
                adapter of requests that name none.
        """
        _log_to_stderr()
        self._settings = Settings.from_environment()
        self._default_adapter = (weights or "").strip() or None
        self._thread = EngineThread()
        self._thread.call(self._load)

    def run(
        self,
        prompt: str = Input(
            description="Prompt for generated image. If you include the `trigger_word` used in the training process you are more likely to activate the trained object, style, or concept in the resulting image."
        ),
        image: Path | None = Input(
            description="Input image for image to image or inpainting mode. If provided, aspect_ratio, width, and height inputs are ignored."
        ),
        mask: Path | None = Input(
            description="Image mask for image inpainting mode. If provided, aspect_ratio, width, and height inputs are ignored."
        ),
        aspect_ratio: str = Input(
            description="Aspect ratio for the generated image. If custom is selected, uses height and width below & will run in bf16 mode",
            choices=ASPECT_RATIOS,
            default="1:1",
        ),
        height: int | None = Input(
            description="Height of generated image. Only works if `aspect_ratio` is set to custom. Will be rounded to nearest multiple of 16. Incompatible with fast generation",
            ge=256,
            le=1440,
        ),
        width: int | None = Input(
            description="Width of generated image. Only works if `aspect_ratio` is set to custom. Will be rounded to nearest multiple of 16. Incompatible with fast generation",
            ge=256,
            le=1440,
        ),
        prompt_strength: float = Input(
            description="Prompt strength when using img2img. 1.0 corresponds to full destruction of information in image",
            ge=0,
            le=1,
            default=0.8,
        ),
        model: str = Input(
            description="Which model to run inference with. The dev model performs best with around 28 inference steps but the schnell model only needs 4 steps.",
            choices=["dev", "schnell"],
            default="dev",
        ),
        num_outputs: int = Input(
            description="Number of outputs to generate", ge=1, le=4, default=1
        ),
        num_inference_steps: int = Input(
            description="Number of denoising steps. More steps can give more detailed images, but take longer.",
            ge=1,
            le=50,
            default=28,
        ),
        guidance_scale: float = Input(
            description="Guidance scale for the diffusion process. Lower values can give more realistic images. Good values to try are 2, 2.5, 3 and 3.5",
            ge=0,
            le=10,
            default=3,
        ),
        seed: int | None = Input(description="Random seed. Set for reproducible generation"),
        output_format: str = Input(
            description="Format of the output images",
            choices=["webp", "jpg", "png"],
            default="webp",
        ),
        output_quality: int = Input(
            description="Quality when saving the output images, from 0 to 100. 100 is best quality, 0 is lowest quality. Not relevant for .png outputs",
            ge=0,
            le=100,
            default=80,
        ),
        disable_safety_checker: bool = Input(
            description="Disable safety checker for generated images.", default=False
        ),
        go_fast: bool = Input(
            description="Run faster predictions with model optimized for speed (currently fp8 quantized); disable to run in original bf16",
            default=False,
        ),
        megapixels: str = Input(
            description="Approximate number of megapixels for generated image",
            choices=["1", "0.25"],
            default="1",
        ),
        replicate_weights: str | None = Input(description=LORA_DESCRIPTION),
        lora_scale: float = Input(
            description="Determines how strongly the main LoRA should be applied. Sane results between 0 and 1 for base inference. For go_fast we apply a 1.5x multiplier to this value; we've generally seen good performance when scaling the base value by that amount. You may still need to experiment to find the best value for your particular lora.",
            ge=-1,
            le=3,
            default=1,
        ),
        extra_lora: str | None = Input(description=LORA_DESCRIPTION),
        extra_lora_scale: float = Input(
            description="Determines how strongly the extra LoRA should be applied. Sane results between 0 and 1 for base inference. For go_fast we apply a 1.5x multiplier to this value; we've generally seen good performance when scaling the base value by that amount. You may still need to experiment to find the best value for your particular lora.",
            ge=-1,
            le=3,
            default=1,
        ),
    ) -> list[Path]:
        """Generate the images that the inputs ask for and return their files."""
        inputs = Inputs(
            prompt=prompt,
            image=image,
            mask=mask,
            aspect_ratio=aspect_ratio,
            height=height,
            width=width,
            prompt_strength=prompt_strength,
            model=model,
            num_outputs=num_outputs,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            seed=seed,
            output_format=output_format,
            output_quality=output_quality,
            disable_safety_checker=disable_safety_checker,
            go_fast=go_fast,
            megapixels=megapixels,
            replicate_weights=replicate_weights,
            lora_scale=lora_scale,
            extra_lora=extra_lora,
            extra_lora_scale=extra_lora_scale,
        )
        return self._thread.call(lambda check_cancelled: self._serve(inputs, check_cancelled))

    def healthcheck(self) -> bool:
        """Whether requests can be served. Cog calls it for every GET /health-check.

        It does not wait for the engine thread, which may be busy with a request.
        """
        from flux.memory.device import answers

        self._inputs.make()  # here, because Cog fetches inputs before it calls `run`
        return self._thread.is_alive and answers(self._engine.device)

    def _load(self, check_cancelled: CheckCancelled) -> None:
        with importing_libraries():
            import torch

            from flux.deployment import Deployment, compute_fp32_in_fp32
            from flux.load import load_engine
            from lora.formats.adapter import Targets, load_adapter

        torch.set_grad_enabled(False)  # of this thread, which serves every request
        compute_fp32_in_fp32()
        deployment = Deployment.choose(self._settings)
        deployment.fetch_checkpoints(
            parts_of(self._settings, deployment.checkpoint), self._settings
        )
        inventory = Inventory()
        self._checker = load_checker(
            self._settings, deployment.checkpoint, deployment.device, inventory
        )
        self._engine = load_engine(deployment, self._settings, inventory)
        self._outputs = Outputs(self._settings.output_directory)
        self._inputs = InputFiles()
        targets = Targets(self._engine.shapes)
        self._loader = AdapterLoader(
            LoaderSettings.of(self._settings),
            lambda path, digest, settings: load_adapter(path, digest, targets, settings),
        )
        self._make_ready(check_cancelled)
        inventory.add(*self._engine.entries())
        inventory.log()

    def _make_ready(self, check_cancelled: CheckCancelled) -> None:
        """Compile, and bring transformers to the device with the adapter that requests will want."""
        wanted = [(self._default_adapter, 1.0)] if self._default_adapter else []
        adapters = self._adapters(wanted, check_cancelled)
        self._engine.warm_up(check_cancelled)
        for key in self._engine.at_start:
            multiplier = scale_multiplier(key.precision)
            scaled = [(adapter, scale * multiplier) for adapter, scale in adapters]
            self._engine.merge(key, scaled, check_cancelled)

    def _serve(self, inputs: Inputs, check_cancelled: CheckCancelled) -> list[Path]:
        """The way of a request, in the engine thread."""
        clear_cache()  # Cog parses data URIs with urlsplit, which keeps the last 128: whole pictures
        self._inputs.clear(keep={Path(file) for file in (inputs.image, inputs.mask) if file})
        stopwatch = Stopwatch()
        with stopwatch.stage("input"):
            request = make_request(inputs, self._settings, self._default_adapter)
        with stopwatch.stage("adapters"):
            adapters = self._adapters(request.adapters, check_cancelled)
        with self._outputs.begin(request.output_format, request.output_quality, stopwatch) as files:
            inspection = Inspection(
                self._checker if request.check_safety else None, len(request.seeds)
            )
            images = self._engine.generate(request, adapters, stopwatch, check_cancelled)
            for image in images:
                with stopwatch.stage("safety"):
                    passes = inspection.passes(image)
                if passes:
                    files.add(image)
                check_cancelled()
            for name, score in inspection.worst.items():
                self.record_metric(f"safety.{name}", round(score, 4))
            inspection.raise_if_none_passed()
            files.wait()
            check_cancelled()
        self._record(request, files, stopwatch)
        return [Path(path) for path in files.paths]

    def _adapters(
        self, wanted: Sequence[tuple[str, float]], check_cancelled: CheckCancelled
    ) -> "list[tuple[Adapter, float]]":
        """Load adapters by reference, and say in the log what each of them is."""
        adapters = []
        for reference, scale in wanted:
            loaded = self._loader.load(reference, check_cancelled)
            logger.info("Adapter %s, scale %g", loaded.describe(), scale)
            adapters.append((loaded.adapter, scale))
        return adapters

    def _record(self, request: Request, files: RequestOutputs, stopwatch: Stopwatch) -> None:
        for stage, seconds in stopwatch.seconds.items():
            self.record_metric(f"timing.{stage}", round(seconds, 4))
        self.record_metric("megapixels", request.width * request.height / MEGAPIXEL)
        self.record_metric("image_output_count", len(files.paths))
        self.record_metric("compiled", int(self._engine.compiled(request)))


def _log_to_stderr() -> None:
    """Send our own log at INFO, and the libraries' warnings, to where the server reads it."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for package in (__name__, "flux", "lora", "safety", "weights"):
        logging.getLogger(package).setLevel(logging.INFO)
