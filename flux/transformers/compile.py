"""Compile the transformers' blocks, each class once for all sizes; run eagerly if that fails.

Compilation is regional (diffusers' `compile_repeated_blocks`): FLUX.1's 57 blocks are of two
classes, so each class is compiled once. The graphs are shared by all blocks, by dev and schnell,
and by all adapters, because weights are inputs of the graphs. There are separate graphs for each
precision (float8 weights are another class of tensor), and for the first single block: the strides
of its inputs differ from those that single blocks pass to each other.

- `dynamic=True`: one graph for all numbers of tokens. torch takes two dimensions that are equal
  while tracing for the same dimension ("duck shapes"): a text of 64 tokens beside heads of width 64
  made four more graphs, and 4096, the tokens of a megapixel, is also T5's width. So the warm-up
  uses odd numbers of image and text tokens; no width is odd.
- `specialize_float=True`: with `dynamic=True`, torch also takes the norms' epsilons for inputs that
  vary, learns after tracing that they cannot, and traces the graph again.
- `fake_tensor_cache_enabled=False`: torch keeps what it learns of an operator by the sizes of its
  inputs. With sizes that vary, comparing them takes longer than asking the operator again.
- The embedders' outputs are detached, which copies nothing. They are views of matrix products.
  torch guards what a view is of, so a graph that was traced with views does not serve the later
  blocks, whose inputs are not views.
- `fullgraph=True`: a graph break would silently cost time in every block of every step. As an error
  it reaches the fallback below, and the log.
- torch compiles dimensions of 1 separately, so images of one token (16 x 16 pixels) are generated
  eagerly.
- `loop_ordering_after_fusion=False`: with it, inductor fuses the quantization of a float8 linear's
  input with what writes that input, and then cannot split a kernel over tokens whose number is a
  sum, of text and image (CantSplit, torch 2.13, for CUDA only; pytorch/pytorch #183696 is alike).
- `realize_opcount_threshold`: with torch's own, inductor stores the amplitudes of a single block's
  rows, in bf16, and quantizes them in a second kernel, which reads all values and computes GELU
  again. With the higher one it is one kernel.
- The VAE is not compiled: its convolutions are library calls either way, it runs once an image,
  and its shapes would cost a second warm-up.
"""

import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn
from torch._dynamo import config as dynamo
from torch._dynamo.utils import counters

from flux.components import TRANSFORMER
from flux.deployment import Deployment
from flux.memory.device import is_out_of_memory
from flux.memory.residency import ORDER
from flux.request import Mode, Request
from flux.variants import VARIANTS, Key, Precision
from weights.serving.cancel import Cancelled
from weights.serving.directories import usable
from weights.serving.errors import DirectoryError
from weights.serving.settings import Settings, SettingsError

logger = logging.getLogger(__name__)

T = TypeVar("T")
CACHE = "TORCHINDUCTOR_CACHE_DIR"
INDUCTOR = {
    "loop_ordering_after_fusion": False,
    "realize_opcount_threshold": 64,  # torch's own is 30; 40 does not suffice
}
DYNAMO = {"specialize_float": True, "fake_tensor_cache_enabled": False}
WARM_UP_TOKENS = (33, 31)  # rows and columns: like a real image, of 0.25 megapixels, but odd


def compile_blocks(
    modules: Mapping[Key, nn.Module], deployment: Deployment, settings: Settings
) -> "Compilation | None":
    """Have the transformers compiled if the settings say so; None if not.

    `auto` compiles with CUDA. On a CPU, compiling takes longer than generating with the miniature.
    Offloaded transformers are not compiled, because hooks move the weights of every layer.

    Raises:
        SettingsError: the cache's directory cannot be used.
    """
    by_itself = deployment.device.type == "cuda" and settings.compile == "auto"
    if not by_itself and settings.compile != "on":
        return None
    if TRANSFORMER in deployment.offloaded:
        logger.info("Transformers that live on the host are not compiled (FLUX_OFFLOAD)")
        return None
    directory = _cache_directory(settings.cache_directory)
    os.environ[CACHE] = str(directory)  # torch documents no other way; Triton's goes beneath it
    return Compilation(modules)


def _cache_directory(root: Path) -> Path:
    """The directory for compiled kernels; a temporary one if the default cannot be used.

    Raises:
        SettingsError: the operator's own choice cannot be used.
    """
    try:
        return usable(root / "compiled", "FLUX_CACHE_DIRECTORY")
    except DirectoryError as error:
        if root != Settings.cache_directory:
            raise SettingsError(f"{error}, or set FLUX_COMPILE=off") from error
        logger.warning("Compiled kernels are not kept for the next start: %s", error)
        return Path(tempfile.mkdtemp(prefix="flux-compiled-"))


class Compilation:
    """Runs work that calls compiled transformers; runs it eagerly after the compiler has failed.

    Args:
        modules: the transformers; their blocks are compiled at the first call.
        backend: a name that torch.compile knows.
    """

    def __init__(self, modules: Mapping[Key, nn.Module], backend: str = "inductor") -> None:
        self._eager: set[Key] = set()
        for module in modules.values():
            for embedder in (module.x_embedder, module.context_embedder):
                embedder.register_forward_hook(_detached)  # type: ignore[union-attr]
            module.compile_repeated_blocks(  # type: ignore[operator]
                dynamic=True,
                fullgraph=True,
                backend=backend,
                options=INDUCTOR if backend == "inductor" else None,
            )

    def serves(self, key: Key) -> bool:
        """Whether a transformer runs compiled; not after the compiler has failed for it."""
        return key not in self._eager

    def run(self, key: Key, tokens: int, work: Callable[[], T]) -> T:
        """Run `work`; if the compiler fails, run it again eagerly, and everything after it.

        Compilers raise exceptions of many classes, some only when a kernel is launched. So the
        outcome decides: if the same work succeeds eagerly, the compiler had failed. A cancel
        and a lack of memory are not failures of the compiler, and are raised again.

        Args:
            key: the transformer that `work` calls.
            tokens: of the image.
            work: may be called twice.
        """
        if tokens == 1 or not self.serves(key):
            return _eagerly(work)
        before = graphs()
        try:
            with dynamo.patch(DYNAMO):  # it holds in this thread alone
                return work()
        except Exception as error:
            if isinstance(error, Cancelled) or is_out_of_memory(error):
                raise
            logger.warning("%s %s failed compiled; trying it eagerly", *key, exc_info=error)
        finally:
            if made := graphs() - before:
                logger.info("Compiled %d graphs for %s %s", made, *key)
        result = _eagerly(work)  # not within `except`: the error holds tensors
        self._eager.add(key)
        logger.warning("%s %s generates eagerly until the next start: that went well", *key)
        return result


def to_warm_up(at_start: Iterable[Key], precisions: Collection[Precision]) -> list[Key]:
    """The transformers to generate with in setup, so that these precisions are compiled there.

    Those of `at_start` come last, so that they are on the device in the end. A precision that
    none of them has is compiled with one that takes turns with them.
    """
    wanted = list(at_start)
    missing = set(precisions) - {key.precision for key in wanted}
    first = {key.precision: key for key in reversed(ORDER)}
    return [key for precision, key in first.items() if precision in missing] + wanted


def warm_up_request(key: Key, token: int) -> Request:
    """A request of one step; running it compiles a transformer for all other requests.

    Args:
        key: of the transformer.
        token: pixels along the side of a token.
    """
    rows, columns = WARM_UP_TOKENS
    variant = VARIANTS[key.variant]
    variant = replace(variant, max_sequence_length=variant.max_sequence_length - 1)
    return Request(
        prompt="",
        variant=variant,
        mode=Mode.TEXT_TO_IMAGE,
        precision=key.precision,
        width=columns * token,
        height=rows * token,
        image=None,
        mask=None,
        sigmas=(1.0,),
        seeds=(0,),
        guidance=1.0 if variant.guidance else None,
        adapters=(),
        output_format="png",
        output_quality=0,
        check_safety=False,
    )


@contextmanager
def warming_up() -> Iterator[None]:
    """Say in the log what a warm-up took."""
    before, start = graphs(), time.perf_counter()
    with warnings.catch_warnings():
        # torchao's tensors have no hash of their own; torch's default one finds them again
        warnings.filterwarnings("ignore", message=".* does not implement _stable_hash_for_caching")
        yield
    made, seconds = graphs() - before, time.perf_counter() - start
    logger.info("Warm-up: %d graphs in %.1f s, cached in %s", made, seconds, os.environ.get(CACHE))


def graphs() -> int:
    """How many graphs this process has compiled."""
    return int(counters["stats"]["unique_graphs"])


def _detached(_module: nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
    """The output of a linear layer as a tensor of its own, no view of another; of the same data."""
    return output.detach()


def _eagerly(work: Callable[[], T]) -> T:
    with torch.compiler.set_stance("force_eager"):
        return work()
