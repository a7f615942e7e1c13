"""Steps of script/bench gpu that measure plain diffusers beside this package, in its process.

diffusers' transformer is made over the very memory of ours for dev in bf16, which holds no adapter
then, so it takes no more room on the device.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file
from torch import Tensor
from torch._dynamo import config as dynamo

from benchmarks.gpu import card
from benchmarks.gpu.session import DEV, GUIDANCE, STEPS, Session
from flux.request import Mode
from weights.serving.cancel import CheckCancelled

Adapter = Mapping[str, Tensor]
"""An adapter's file, read beforehand, as ours are."""
RECOMPILE_LIMIT = 64  # two pipelines in one process compile the same code


def plain(session: Session) -> None:
    """diffusers' pipeline, eager, then with compile_repeated_blocks."""
    pipeline = _pipeline(session)
    _series(session, pipeline, "plain", "diffusers eager", 1)
    session.call(lambda _: setattr(dynamo, "recompile_limit", RECOMPILE_LIMIT))  # of that thread
    backend = "eager" if session.rehearse else "inductor"
    # Sizes that differ from those that ours was traced with would count as dynamic.
    pipeline.transformer.compile_repeated_blocks(fullgraph=True, dynamic=False, backend=backend)
    _series(session, pipeline, "plain", "diffusers compiled", 3)


def peft(session: Session) -> None:
    """diffusers with PEFT's layers: an image, and changes of adapter by reload and by hot-swap."""
    pipeline, (one, two) = _pipeline(session), [load_file(file) for file in session.files]
    pipeline.load_lora_weights(one, adapter_name="a")
    _series(session, pipeline, "peft", "diffusers eager with an adapter (PEFT)", 1)

    def reload(adapter: Adapter) -> None:
        pipeline.unload_lora_weights()
        pipeline.load_lora_weights(adapter, adapter_name="a")

    _swaps(session, "unload and load", reload, (two, one, two))
    pipeline.unload_lora_weights()
    pipeline = _pipeline(session)
    pipeline.enable_lora_hotswap(target_rank=16)
    pipeline.load_lora_weights(one, adapter_name="a")

    def hotswap(adapter: Adapter) -> None:
        pipeline.load_lora_weights(adapter, adapter_name="a", hotswap=True)

    _swaps(session, "hot-swap", hotswap, (two, one, two))


def _pipeline(session: Session) -> FluxPipeline:
    session.merge(DEV, [])
    ours = session.engine._transformers.modules[DEV]
    with torch.device("meta"):
        transformer = FluxTransformer2DModel.from_config(dict(ours.config))
    transformer.load_state_dict(dict(ours.named_parameters()), assign=True, strict=True)
    transformer.eval().requires_grad_(False)
    components = session.engine._pipelines[DEV, Mode.TEXT_TO_IMAGE].components
    found = FluxPipeline(**components | {"transformer": transformer})
    found.set_progress_bar_config(disable=True)
    return found


def _series(session: Session, pipeline: FluxPipeline, step: str, name: str, rounds: int) -> None:
    """Generate some images after a short one, and record the median."""
    side, full = (64, 2) if session.rehearse else (1024, STEPS["dev"])

    def generate(check: CheckCancelled, steps: int) -> float:
        def stop(*_: object) -> dict[str, torch.Tensor]:
            check()
            return {}

        def work() -> None:
            pipeline(
                session.prompt(),
                width=side,
                height=side,
                num_inference_steps=steps,
                guidance_scale=GUIDANCE,
                generator=torch.Generator("cpu").manual_seed(0),
                callback_on_step_end=stop,
            )

        return card.timed(work, session.device)

    session.call(lambda check: generate(check, 2))
    runs = [float(session.call(lambda check: generate(check, full))) for _ in range(rounds)]
    seconds = median(runs)
    figures = {
        f"{name}, s": round(seconds, 3),
        f"{name}, step ms (about)": round(1000 * seconds / full, 1),
    }
    session.record(step, figures, runs=[round(run, 4) for run in runs])


def _timed(work: Callable[[], None], device: torch.device, _: object) -> float:
    return card.timed(work, device)


def _swaps(
    session: Session, name: str, change: Callable[[Adapter], None], adapters: Sequence[Adapter]
) -> None:
    runs = [session.call(partial(_timed, partial(change, a), session.device)) for a in adapters]
    session.record("peft", {f"diffusers, {name}, ms": round(1000 * median(runs), 1)}, runs=runs)
