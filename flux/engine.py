"""The engine: requests in, images out, one after another."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import ParamSpec, TypeVar

import torch
from diffusers import DiffusionPipeline, FluxImg2ImgPipeline, FluxInpaintPipeline, FluxPipeline
from PIL import Image
from torch import nn

from flux.autoencoder import Autoencoder
from flux.canvas import Canvas, prepare
from flux.components import TRANSFORMER
from flux.inpaint import soft_alpha
from flux.memory.residency import BudgetError
from flux.positions import keep_positions
from flux.prompts import PromptEmbeddings, PromptEncoder
from flux.request import Mode, Request
from flux.transformers.adapters import AdapterLike
from flux.transformers.compile import Compilation, to_warm_up, warm_up_request, warming_up
from flux.transformers.merge import WorkingWeights
from flux.transformers.pool import Transformers
from flux.variants import Key
from weights.serving.cancel import CheckCancelled
from weights.serving.inventory import Entry
from weights.serving.timing import Stopwatch

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

PIPELINES = {
    Mode.TEXT_TO_IMAGE: FluxPipeline,
    Mode.IMAGE_TO_IMAGE: FluxImg2ImgPipeline,
    Mode.INPAINT: FluxInpaintPipeline,
}
ENCODERS = ("text_encoder", "text_encoder_2")
Adapters = Sequence[tuple[AdapterLike, float]]
"""Adapters with their scales."""


class Engine:
    """Serves requests with diffusers' pipelines; only ever used from the engine thread.

    Args:
        pipelines: a text-to-image pipeline for each variant, sharing VAE and text encoders; they
            need no transformers.
        transformers: those that generate.
        compilation: of these transformers; None where they are not compiled.
    """

    def __init__(
        self,
        pipelines: dict[str, FluxPipeline],
        transformers: Transformers,
        compilation: Compilation | None = None,
    ) -> None:
        self._pipelines = {
            (key, mode): _sibling(pipelines[key.variant], kind, transformer)
            for key, transformer in transformers.modules.items()
            for mode, kind in PIPELINES.items()
        }
        self._positions = {k: keep_positions(t) for k, t in transformers.modules.items()}
        shared = next(iter(pipelines.values()))  # its VAE and text encoders serve both
        self._autoencoder = Autoencoder(shared)
        self._prompts = PromptEncoder(shared)
        self._transformers = transformers
        self._compilation = compilation
        self._encoders = WorkingWeights({name: getattr(shared, name) for name in ENCODERS})

    @property
    def shapes(self) -> dict[str, dict[str, torch.Size]]:
        """Shapes of all weights that adapters can change: component, parameter name, shape.

        The transformer is dev's, which has every parameter of schnell's.
        """
        dev = self._pipelines[Key("dev", "bf16"), Mode.TEXT_TO_IMAGE]
        return {
            name: {key: value.shape for key, value in getattr(dev, name).named_parameters()}
            for name in (TRANSFORMER, *ENCODERS)
        }

    @property
    def device(self) -> torch.device:
        """The device that the engine computes on."""
        return self._autoencoder.device

    def compiled(self, request: Request) -> bool:
        """Whether the transformer of a request is compiled, and not given up after a failure."""
        return self._compilation is not None and self._compilation.serves(request.key)

    def entries(self) -> list[Entry]:
        """Rows for the table of setup: the transformers."""
        return self._transformers.entries()

    @property
    def at_start(self) -> Sequence[Key]:
        """The transformers to have on the device before the first request, in this order."""
        return self._transformers.at_start

    def merge(self, key: Key, adapters: Adapters, check_cancelled: CheckCancelled) -> None:
        """Make the weights that serve contain these adapters and nothing else.

        Args:
            key: the transformer that will run; it is loaded to the device if needed.
            adapters: with their effective scales.
            check_cancelled: called before each weight is written.

        Raises:
            BudgetError: the device lacks memory for it.
        """
        encoders = self._on_device(key, self._encoders.reconcile, adapters, check_cancelled)
        transformer = self._transformers.reconcile(key, adapters, check_cancelled)
        merged = encoders.merged + transformer.merged
        restored = encoders.restored + transformer.restored
        absent = sum(component == TRANSFORMER for component, _ in transformer.absent)
        if merged or restored:
            logger.info("Adapters: %d weights merged, %d restored", merged, restored)
        if absent:
            logger.info(
                "Adapters: %d weights are left out, %s has none of them", absent, key.variant
            )

    def warm_up(self, check_cancelled: CheckCancelled) -> None:
        """Compile the transformers by running one step of each, and what merges adapters."""
        if self._compilation is not None:
            self._compile(check_cancelled)
        self._transformers.warm_up()

    def _compile(self, check_cancelled: CheckCancelled) -> None:
        with warming_up():
            for key in to_warm_up(self.at_start, self._transformers.precisions):
                try:
                    self.merge(key, (), check_cancelled)
                    self._warm_up_once(
                        warm_up_request(key, self._autoencoder.token_size), check_cancelled
                    )
                except BudgetError as error:
                    logger.info("%s %s is not compiled: %s", *key, error)

    def _warm_up_once(self, request: Request, check_cancelled: CheckCancelled) -> None:
        """Run the compiled part of a request: the denoising, without decoding."""
        key, seed = request.key, request.seeds[0]
        prompt = self._on_device(key, self._encode_prompt, request)
        canvas = self._on_device(key, prepare, request, self._autoencoder)
        self._on_device(key, self._denoise, request, prompt, canvas, seed, check_cancelled)

    def generate(
        self,
        request: Request,
        adapters: Adapters,
        stopwatch: Stopwatch,
        check_cancelled: CheckCancelled,
    ) -> Iterator[Image.Image]:
        """Generate the images of a request, each when it is asked for.

        Image k equals the first image of a request with seed + k: images are generated alone, and
        their noise on the CPU.

        Args:
            adapters: with their effective scales.
            stopwatch: gets the seconds of each stage.
            check_cancelled: called before each weight and each step.

        Yields:
            RGB images of the request's size.

        Raises:
            BudgetError: the device lacks memory for it, also with nothing else there.
        """
        if not request.sigmas and request.image:
            yield from [request.image] * len(request.seeds)
            return
        key = request.key
        with self._stage(stopwatch, "adapters"):
            self.merge(key, adapters, check_cancelled)
        with self._stage(stopwatch, "text"):
            prompt = self._on_device(key, self._encode_prompt, request)
        check_cancelled()
        with self._stage(stopwatch, "input"):
            canvas = self._on_device(key, prepare, request, self._autoencoder)
        for seed in request.seeds:
            check_cancelled()
            with self._stage(stopwatch, "denoising"):
                latents = self._on_device(
                    key, self._denoise, request, prompt, canvas, seed, check_cancelled
                )
            check_cancelled()
            with self._stage(stopwatch, "decoding"):
                image = self._decode(request, canvas, latents)
            check_cancelled()
            yield image

    @contextmanager
    def _stage(self, stopwatch: Stopwatch, name: str) -> Iterator[None]:
        """A stage of the stopwatch, including the work that it has queued on a GPU."""
        with stopwatch.stage(name):
            yield
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)

    def _on_device(self, key: Key, work: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        """Do some work on the device, again with less there if its memory does not suffice.

        Raises:
            BudgetError: it does not suffice then either.
        """
        return self._transformers.with_room(key, partial(work, *args, **options))

    def _encode_prompt(self, request: Request) -> PromptEmbeddings:
        state = tuple(self._encoders.fingerprint(name) for name in ENCODERS)
        return self._prompts.encode(request.prompt, request.variant.max_sequence_length, state)

    def _denoise(
        self,
        request: Request,
        prompt: PromptEmbeddings,
        canvas: Canvas,
        seed: int,
        check_cancelled: CheckCancelled,
    ) -> torch.Tensor:
        """Packed latents of one image, [1, tokens, 4 * channels]."""

        def on_step_end(*_: object) -> dict[str, torch.Tensor]:
            check_cancelled()
            return {}

        def denoise() -> torch.Tensor:
            with self._positions[request.key].kept():
                latents: torch.Tensor = self._pipelines[request.key, request.mode](
                    prompt_embeds=prompt.prompt_embeds,
                    pooled_prompt_embeds=prompt.pooled_prompt_embeds,
                    width=canvas.width,
                    height=canvas.height,
                    num_inference_steps=len(request.sigmas),
                    sigmas=list(request.sigmas),
                    guidance_scale=request.guidance or 0.0,
                    generator=torch.Generator("cpu").manual_seed(seed),
                    output_type="latent",
                    callback_on_step_end=on_step_end,
                    **canvas.arguments,
                ).images
            return latents

        if self._compilation is None:
            return denoise()
        return self._compilation.run(request.key, canvas.image_seq_len, denoise)

    def _decode(self, request: Request, canvas: Canvas, latents: torch.Tensor) -> Image.Image:
        generated = self._decode_canvas(request.key, canvas, latents)
        generated = generated.crop((0, 0, request.width, request.height))
        if request.image and request.mask:
            return Image.composite(generated, request.image, soft_alpha(request.mask))
        return generated

    def _decode_canvas(self, key: Key, canvas: Canvas, latents: torch.Tensor) -> Image.Image:
        decode = partial(self._autoencoder.decode, latents, canvas.width, canvas.height)
        try:
            return self._on_device(key, decode)
        except BudgetError as error:
            logger.warning("Decoding in tiles: %s", error.__cause__ or error)
        return self._on_device(key, decode, tiled=True)  # not within `except`: it holds tensors


def _sibling(
    pipeline: FluxPipeline, kind: type[DiffusionPipeline], transformer: nn.Module
) -> DiffusionPipeline:
    """A pipeline of another kind over the same components, but for the transformer."""
    sibling = kind(**pipeline.components | {TRANSFORMER: transformer})
    sibling.set_progress_bar_config(mininterval=0)  # a line for every step, however fast
    return sibling
