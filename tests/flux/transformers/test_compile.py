"""Compilation in the engine: what is a compiler's failure, and what is not; cheap backends."""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch._dynamo import register_backend

from flux.components import load_skeleton
from flux.deployment import Deployment
from flux.engine import Engine
from flux.memory.budget import bytes_of
from flux.memory.offload import COMPONENTS
from flux.memory.residency import ORDER, BudgetError
from flux.request import Inputs, Mode, make_request
from flux.transformers.compile import Compilation, compile_blocks, graphs, to_warm_up
from miniature import checkpoint
from tests.flux.engines import parts
from tests.support.pictures import colours, same
from tests.support.predictor import without_decoding
from weights.serving.cancel import Cancelled, CheckCancelled, never_cancelled
from weights.serving.settings import Settings, SettingsError
from weights.serving.timing import Stopwatch

HERE = Deployment("nano", torch.device("cpu"), torch.float32)
DEV, DEV8, SCHNELL8, SCHNELL = ORDER
SHALLOW = checkpoint.Dimensions(
    double_blocks=1,
    single_blocks=1,
    heads=16,  # a width of 512, dev's number of text tokens
    t5_layers=1,
    clip_layers=1,
    vae_channels=(8, 8, 8, 8, 16),
)


class Backend:
    """Compiles to what it is given, and counts; fails when it is told to.

    Attributes:
        name: that torch knows it by.
    """

    def __init__(self) -> None:
        self.name = f"counting{id(self)}"
        register_backend(self, name=self.name)
        self.compiled = self.called = 0
        self.compile_failure: Exception | None = None
        self.call_failure: Exception | None = None

    def __call__(self, graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        if self.compile_failure:
            raise self.compile_failure
        self.compiled += 1

        def call(*arguments: object) -> object:
            self.called += 1
            if self.call_failure:
                raise self.call_failure
            return graph.forward(*arguments)

        return call


@pytest.fixture(autouse=True, scope="module")
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield
    torch._dynamo.reset()


Start = Callable[..., Engine]
GRAPHS = 4  # two blocks in two precisions


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Start:
    """Makes an engine of one block of each kind; `share` of dev's bytes is room on the device.

    Graphs of all backends are kept: torch allows eight of a block in all (`recompile_limit`).
    """
    directory = tmp_path_factory.mktemp("shallow")
    checkpoint.build(directory, SHALLOW)
    settings = Settings(checkpoint=str(directory), device="cpu")
    whole = bytes_of(load_skeleton("dev", directory / "dev" / "transformer", torch.float32))
    dev, _ = parts(settings)[0].values()
    shared = sum(map(bytes_of, (dev.vae, dev.text_encoder, dev.text_encoder_2)))

    def make(backend: Backend | None = None, share: float | None = None) -> Engine:
        room = None if share is None else shared + int(share * whole)
        pipelines, transformers = parts(replace(settings, device_memory_bytes=room))
        compilation = Compilation(transformers.modules, backend.name) if backend else None
        return Engine(pipelines, transformers, compilation)

    return make


def generate(engine: Engine, check: CheckCancelled = never_cancelled, **inputs) -> Image.Image:
    quick = {"prompt": "a hat", "megapixels": "0.25", "num_inference_steps": 1, "seed": 1}
    request = make_request(Inputs(**quick | inputs), Settings())
    (image,) = engine.generate(request, (), Stopwatch(), check)
    return image


@pytest.fixture(scope="module")
def expected(start: Start) -> Image.Image:
    return generate(start())


# --- failures of a compiler


def test_a_compiler_that_fails_in_the_warm_up(start, expected, caplog) -> None:
    backend = Backend()
    backend.compile_failure = ValueError("no such instruction")
    engine = start(backend, share=1.01)
    engine.warm_up(lambda: None)
    assert "dev bf16 failed compiled; trying it eagerly" in caplog.text
    assert "no such instruction" in caplog.text
    assert "dev bf16 generates eagerly until the next start" in caplog.text
    assert same(generate(engine), expected)


@pytest.fixture(scope="module")
def compiled(start: Start) -> tuple[Engine, Backend]:
    """An engine that has compiled in setup, and its backend; it stays so whatever the tests do."""
    torch._dynamo.reset()
    backend = Backend()
    engine = start(backend, share=1.01)
    engine.warm_up(lambda: None)
    assert backend.compiled == GRAPHS
    return engine, backend


@pytest.mark.parametrize("where", ["compile_failure", "call_failure"])
def test_a_compiler_that_fails_in_a_request(
    start, expected, compiled, monkeypatch, caplog, where: str
) -> None:
    """When it compiles, or in a kernel that cannot be launched."""
    backend = Backend() if where == "compile_failure" else compiled[1]
    engine = start(backend)
    with monkeypatch.context() as patch:
        patch.setattr(backend, where, RuntimeError("out of resource: shared memory"))
        for _ in range(2):
            assert same(generate(engine), expected)
        assert caplog.text.count("failed compiled; trying it eagerly") == 1  # not tried again
    before = backend.called
    generate(engine, go_fast=True)
    assert backend.called > before  # the other precision is compiled all the same
    request = make_request(Inputs("a hat"), Settings())
    assert not engine.compiled(request)  # the metric of every prediction
    assert engine.compiled(replace(request, precision="fp8"))


# --- failures that are not a compiler's


@pytest.fixture
def stays_compiled(compiled, expected, caplog) -> Iterator[tuple[Engine, Backend]]:
    yield compiled
    engine, backend = compiled
    before = backend.called
    assert same(generate(engine), expected)
    assert backend.called > before
    assert "generates eagerly" not in caplog.text


def test_a_cancel(stays_compiled) -> None:
    engine, backend = stays_compiled
    before = backend.called

    def cancel() -> None:
        if backend.called > before:
            raise Cancelled

    with pytest.raises(Cancelled):
        generate(engine, cancel)


def test_out_of_memory_in_a_kernel(stays_compiled, monkeypatch) -> None:
    engine, backend = stays_compiled
    lacking = torch.OutOfMemoryError("CUDA out of memory (pretended)")
    with monkeypatch.context() as patch:
        patch.setattr(backend, "call_failure", lacking)
        with pytest.raises(BudgetError, match="Out of memory on cpu, also with dev bf16 alone"):
            generate(engine)


def test_what_fails_eagerly_too_is_raised(stays_compiled, monkeypatch) -> None:
    engine, _ = stays_compiled

    def broken(*_: object, **__: object) -> None:
        raise ArithmeticError("sigma is not a number")

    scheduler = engine._pipelines[DEV, Mode.TEXT_TO_IMAGE].scheduler
    with monkeypatch.context() as patch:
        patch.setattr(scheduler, "step", broken)
        with pytest.raises(ArithmeticError, match="sigma is not a number"):
            generate(engine)


def test_one_token_is_generated_eagerly(stays_compiled, tmp_path) -> None:
    colours(32, 32).save(tmp_path / "cell.png")
    engine, backend = stays_compiled
    before = backend.called, graphs()
    generate(engine, image=tmp_path / "cell.png")
    assert before == (backend.called, graphs())


def test_out_of_memory_while_it_compiles(start, expected, caplog) -> None:
    backend = Backend()
    backend.compile_failure = torch.OutOfMemoryError("CUDA out of memory (pretended)")
    engine = start(backend)
    with pytest.raises(BudgetError, match="Out of memory on cpu, also with dev bf16 alone"):
        generate(engine)
    backend.compile_failure = None
    assert same(generate(engine), expected)
    assert backend.called
    assert "eagerly" not in caplog.text


# --- graphs


def test_transformers_that_leave_and_return_need_no_graph(compiled, monkeypatch, caplog) -> None:
    without_decoding(monkeypatch)
    caplog.set_level("INFO")
    engine, backend = compiled
    for model, go_fast in [("schnell", True), ("dev", True), ("schnell", False), ("dev", False)]:
        for megapixels in ("0.25", "1"):
            size = {"megapixels": megapixels, "num_inference_steps": 1}
            generate(engine, model=model, go_fast=go_fast, **size)
    assert backend.compiled == GRAPHS  # those of the warm-up serve the tests before this, too
    assert "schnell fp8 leaves cpu" in caplog.text


def test_what_has_no_room_is_not_compiled(start, caplog) -> None:
    caplog.set_level("INFO")
    start(Backend(), share=0.99).warm_up(lambda: None)
    assert "dev bf16 is not compiled: dev bf16 takes" in caplog.text
    assert "Compiled 2 graphs for schnell fp8" in caplog.text
    assert "Warm-up: 2 graphs" in caplog.text  # dev needs none of its own


def test_all_precisions_are_warmed_up_and_the_start_comes_last() -> None:
    both = ("bf16", "fp8")
    assert to_warm_up([SCHNELL8, DEV8, DEV], both) == [SCHNELL8, DEV8, DEV]
    assert to_warm_up([DEV], both) == [DEV8, DEV]
    assert to_warm_up([DEV8], both) == [DEV, DEV8]
    assert to_warm_up([SCHNELL8, DEV8], ("fp8",)) == [SCHNELL8, DEV8]


# --- settings


@pytest.mark.parametrize(
    ("choice", "device", "compiles"),
    [
        ("auto", "cpu", False),
        ("off", "cpu", False),
        ("on", "cpu", True),
        ("auto", "cuda", True),
        ("off", "cuda", False),
    ],
)
def test_who_compiles(tmp_path, monkeypatch, choice: str, device: str, compiles: bool) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    settings = Settings(compile=choice, cache_directory=tmp_path / "new")
    made = compile_blocks({}, Deployment("nano", torch.device(device), torch.float32), settings)
    assert (made is not None) == compiles
    directory = tmp_path / "new" / "compiled"
    assert directory.is_dir() == compiles
    assert (os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(directory)) == compiles


def test_a_cache_that_cannot_be_made_fails_setup(tmp_path) -> None:
    (tmp_path / "file").touch()
    settings = Settings(compile="on", cache_directory=tmp_path / "file")
    message = "/file/compiled: this directory .* FLUX_CACHE_DIRECTORY .* or set FLUX_COMPILE=off"
    with pytest.raises(SettingsError, match=message):
        compile_blocks({}, HERE, settings)


def test_without_a_home_compiled_kernels_are_not_kept(monkeypatch, caplog) -> None:
    monkeypatch.setenv("HOME", "/dev/null")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    assert compile_blocks({}, HERE, Settings(compile="on"))
    assert "not kept for the next start: ~/.cache" in caplog.text
    assert Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).is_dir()


def test_transformers_that_live_on_the_host_are_not_compiled(tmp_path, caplog) -> None:
    caplog.set_level("INFO")
    settings = Settings(compile="on", cache_directory=tmp_path)
    for offload, compiles in (("t5", True), ("all", False)):
        deployment = replace(HERE, offloaded=COMPONENTS[offload])
        assert (compile_blocks({}, deployment, settings) is not None) == compiles
        assert ("not compiled (FLUX_OFFLOAD)" in caplog.text) != compiles
