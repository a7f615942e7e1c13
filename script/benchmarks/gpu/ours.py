"""The steps of script/bench gpu that measure this package once it is set up."""

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from inspect import signature
from statistics import median
from typing import Any

import torch
from PIL import Image

from benchmarks.gpu import card, profile
from benchmarks.gpu.session import DEV, DEV8, Session
from flux.autoencoder import memory_format
from flux.canvas import prepare
from flux.memory.budget import DEVICE_RESERVE
from flux.memory.residency import BaseCopy
from flux.request import Request
from flux.sampling import ASPECT_RATIOS
from flux.transformers.compile import graphs
from flux.transformers.float8 import storage
from flux.variants import Key
from safety.checker import SafetyError
from weights.serving.cancel import CheckCancelled

EVERY = 40  # of the weights, one in so many is compared bit by bit


def images(session: Session) -> None:
    """dev in both precisions, without and with an adapter, and with fewer pixels."""
    for precision, go_fast in (("fp8", True), ("bf16", False)):
        generated = session.series("images", f"dev {precision}", go_fast=go_fast)
        generated.image.save(session.out / f"dev-{precision}.webp")
        session.series(
            "images",
            f"dev {precision} with an adapter",
            adapters=session.adapters[0],
            go_fast=go_fast,
        )
    session.clean()
    session.series("images", "dev fp8, 512 x 512", go_fast=True, megapixels="0.25")


def swaps(session: Session) -> None:
    """Changes of adapter: base weights on the device, if they are there, then on the host."""
    one, two = session.adapters

    def turn(where: str, rounds: int = 3) -> None:
        for key, other in ((DEV8, DEV), (DEV, DEV8)):
            session.clean()
            session.merge(other, one)  # or its weights would be base ones on the device
            session.merge(key, one)
            turns = itertools.cycle((two, one))
            seconds = [session.merge(key, next(turns)) for _ in range(2 * rounds)]
            figures = {"swap": sorted(seconds)[rounds], "restore": session.merge(key, [])}
            name = f"{' '.join(key)} {{}}, base weights {where}, ms"
            session.record(
                "swaps",
                {name.format(what): round(1000 * s, 1) for what, s in figures.items()},
                runs=[round(1000 * s, 1) for s in seconds],
            )
        session.clean()

    if "dev" in session.engine._transformers._copies:
        turn("on the device")
    seconds, place = _to_host(session, "dev")
    figures = {"until dev's base weights are at hand on the host, s": round(seconds, 2)}
    session.record("swaps", {**figures, "dev's base weights are in": place})
    turn(f"in {place}")
    session.record("swaps", {"nothing to change, ms": round(1000 * session.merge(DEV, []), 2)})


def _to_host(session: Session, variant: str) -> tuple[float, str]:
    """Have base weights read from the host; return the seconds until they are at hand, and where.

    That is the time of page-locking, where they are page-locked and setup has not begun it.
    """
    session.evict(BaseCopy(variant), for_good=True)
    base = session.engine._transformers._base_weights[variant]
    seconds = session.call(lambda _: card.timed(base.at_hand, session.device))
    return seconds, base.entry().place


def ratios(session: Session) -> None:
    """The first image of each size after setup against the second, and graphs made since setup."""
    slower, peaks = {}, {}
    for ratio in ASPECT_RATIOS:
        requests = [session.request(go_fast=True, aspect_ratio=ratio, steps=4) for _ in range(2)]
        first, second = map(session.generate, requests)
        slower[ratio] = round(first.seconds / second.seconds, 3)
        peaks[ratio] = second.peak_gb
    session.record(
        "ratios",
        {
            "graphs in requests": graphs() - session.graphs,
            "first over second image, at most": max(slower.values()),
        },
        first_over_second=slower,
        peak_gb_beside_weights=peaks,
    )


def memory(session: Session) -> None:
    """Peaks beside the weights for the largest image, in each mode; the reserve must hold them."""
    side = 64 if session.rehearse else 1440
    picture = session.out / "picture.png"
    Image.effect_noise((side, side), 80).convert("RGB").save(picture)
    modes: dict[str, dict[str, Any]] = {
        "text": {"aspect_ratio": "custom", "width": 1440, "height": 1440},
        "image to image": {"image": picture},
        "inpainting": {"image": picture, "mask": picture},
    }
    session.generate(session.request(steps=2, megapixels="0.25"))  # its weights may have left
    for name, inputs in modes.items():
        generated = session.generate(session.request(steps=2, **inputs))
        figures = {f"{name}, peak GB beside weights": generated.peak_gb}
        session.record("memory", figures, pixels=generated.image.size)
    session.record("memory", {"reserve, GB": round(DEVICE_RESERVE / 1e9, 2)})


def kernels(session: Session) -> None:
    """A step by kind of kernel, and how long the host takes to queue one."""
    steps = 2 if session.rehearse else 4
    for go_fast, megapixels in itertools.product((True, False), ("1", "0.25")):
        request = session.request(go_fast=go_fast, megapixels=megapixels, steps=steps)

        def work(
            check: CheckCancelled, request: Request = request
        ) -> tuple[list[profile.Span], float, float]:
            denoise = _denoising(session, request, check)
            denoise()  # the first of its size
            whole = card.timed(denoise, session.device)
            queued = _queuing(session, request, check)
            return profile.kernels(denoise, session.device), queued, whole

        spans, queued, whole = session.call(work)
        name = f"dev {request.precision}, {megapixels} MP"
        figures = {"by the clock, ms": whole / steps, "queued by the host in, ms": queued}
        found = {n: round(1000 * s, 2) for n, s in figures.items()} | profile.shares(spans, steps)
        session.record(
            "kernels",
            {f"{name}: {key}": value for key, value in found.items()},
            kernels=profile.longest(spans, steps),
        )


def _queuing(session: Session, request: Request, check: CheckCancelled) -> float:
    """Median seconds that the host takes to queue a step while the device has nothing to do.

    Nothing, because CUDA has the host wait where about 1000 launches are pending: one step's.
    """
    ends: list[tuple[float, float]] = []  # of each step: for the host, then for the device

    def at_end() -> None:
        check()
        queued = time.perf_counter()
        card.synchronize(session.device)
        ends.append((queued, time.perf_counter()))

    denoise = _denoising(session, request, at_end)
    ends.clear()  # merging may have called it too
    denoise()
    return median(queued - begun for (_, begun), (queued, _) in itertools.pairwise(ends))


def _denoising(
    session: Session, request: Request, check: CheckCancelled
) -> Callable[[], torch.Tensor]:
    """A request's steps alone, without adapters; all that comes before them is done here."""
    engine = session.engine
    engine.merge(request.key, [], check)
    prompt, canvas = engine._encode_prompt(request), prepare(request, engine._autoencoder)
    return partial(engine._denoise, request, prompt, canvas, request.seeds[0], check)


def schnell(session: Session) -> None:
    """schnell in both precisions and sizes; first it comes from the host, as on an 80 GB card."""
    _, place = _to_host(session, "schnell")
    keys = (Key("schnell", "fp8"), Key("schnell", "bf16"))
    for key in keys:
        for each in keys:  # one would be made from the other, on the device
            session.evict(each)
        beside = [" ".join(other) for other in session.engine._transformers.resident]
        seconds = session.merge(key, [])
        name = f"schnell {key.precision} comes in from {place}, s"
        session.record("schnell", {name: round(seconds, 2)}, beside=beside)
        for megapixels in ("1", "0.25"):
            session.series(
                "schnell",
                f"schnell {key.precision}, {megapixels} MP",
                model="schnell",
                go_fast=key.precision == "fp8",
                megapixels=megapixels,
            )


def eager(session: Session) -> None:
    """dev without compiled blocks."""
    for precision, go_fast in (("bf16", False), ("fp8", True)):
        session.series("eager", f"dev {precision} eager", 1, eager=True, go_fast=go_fast)


def numbers(session: Session) -> None:
    """Latents after one step against eager bf16, and the bits of merges and restorations."""
    latents = {}
    for go_fast, compiled in itertools.product((False, True), (False, True)):
        request = session.request(go_fast=go_fast, steps=1)
        request = replace(request, prompt="numbers")

        def work(
            check: CheckCancelled, request: Request = request, compiled: bool = compiled
        ) -> torch.Tensor:
            with nullcontext() if compiled else torch.compiler.set_stance("force_eager"):
                return _denoising(session, request, check)().double()

        latents[f"{request.precision} {'compiled' if compiled else 'eager'}"] = session.call(work)
    exact = latents.pop("bf16 eager")
    distances = {
        f"{name} against bf16 eager, relative": round(
            float((found - exact).norm() / exact.norm()), 6
        )
        for name, found in latents.items()
    }
    session.record("numbers", distances | {"all finite": bool(exact.isfinite().all())})
    for key in (DEV, DEV8):
        session.record("numbers", dict(_bits(session, key)))


def _bits(session: Session, key: Key) -> Iterator[tuple[str, bool]]:
    """Whether merges give the same bits again, and restorations the base ones."""
    parameters = list(session.engine._transformers.modules[key].parameters())[::EVERY]
    one, two = session.adapters
    states = []
    for adapters in ([], one, two, one, []):
        session.merge(key, adapters)
        tensors = [tensor for parameter in parameters for tensor in storage(parameter)]
        states.append([tensor.clone().view(torch.uint8) for tensor in tensors])
    same = lambda a, b: all(torch.equal(x, y) for x, y in zip(a, b, strict=True))  # noqa: E731
    name = " ".join(key)
    yield f"{name}: a merge repeated has the same bits", same(states[1], states[3])
    yield f"{name}: another adapter has others", not same(states[1], states[2])
    yield f"{name}: restored weights have the base weights' bits", same(states[0], states[4])


def decoder(session: Session) -> None:
    """The VAE in both layouts of memory, and encoding a prompt."""
    engine, found = session.engine, {}
    vae, side = engine._autoencoder._vae, 8 if session.rehearse else 128
    chosen = memory_format(session.device)

    def decode(layout: torch.memory_format, _: object) -> float:
        vae.to(memory_format=layout)
        latents = torch.randn(1, 16, side, side, device=vae.device, dtype=vae.dtype)
        latents = latents.to(memory_format=layout)
        return card.seconds_of(lambda: vae.decode(latents, return_dict=False), session.device, 3)

    for layout in (torch.channels_last, torch.contiguous_format, chosen):
        seconds = session.call(partial(decode, layout))
        found[f"decode, {str(layout).removeprefix('torch.')}, ms"] = round(1000 * seconds, 2)

    def encode(_: CheckCancelled) -> float:
        work = partial(engine._prompts._encode, session.prompt(), 512)
        return card.seconds_of(work, session.device, 3)

    found["encode a prompt, ms"] = round(1000 * session.call(encode), 2)
    session.record("decoder", found)


def backends(session: Session) -> None:
    """dev fp8 with attention's kernels by name; `native` is torch's own choice."""
    module = session.engine._transformers.modules[DEV8]
    names = (
        ("_native_flash", "_native_cudnn") if session.device.type == "cuda" else ("_native_math",)
    )
    try:
        for name in names:
            module.set_attention_backend(name)
            session.series("backends", f"dev fp8 {name}", 1, go_fast=True)
    finally:
        module.set_attention_backend("native")


def request(session: Session) -> None:
    """A whole request with the defaults: the contract's own function, files written."""
    predictor = session.predictor
    for go_fast in (True, False):
        inputs = {
            name: p.default.default for name, p in signature(predictor.run).parameters.items()
        }
        inputs |= {"prompt": session.prompt(), "seed": 3, "go_fast": go_fast}
        if session.rehearse:
            inputs |= {"num_inference_steps": 1, "megapixels": "0.25"}
        start = time.perf_counter()
        with suppress(SafetyError):  # random weights generate noise, which a checker may mistake
            predictor.run(**inputs)
        seconds = round(time.perf_counter() - start, 3)
        session.record("request", {f"go_fast {go_fast}, s": seconds}, metrics=predictor.metrics)
