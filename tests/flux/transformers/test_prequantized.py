"""Working transformers from float8 files: whole or healed, and the base copy opened once."""

from pathlib import Path

import pytest
import torch
from torch import nn

from flux.components import load_skeleton, load_transformer
from flux.memory.offload import OnHost, Placement
from flux.memory.residency import ORDER
from flux.transformers.base_weights import BaseWeights
from flux.transformers.pool import Transformers
from flux.transformers.prequantized import Identity, Prequantized, fingerprint_of, write
from tests.flux.merging import SIZE
from tests.flux.pools import assert_bits
from tests.flux.streams import Streams
from tests.support import tiny

CPU, BF16 = torch.device("cpu"), torch.bfloat16
DEV, DEV8, _, _ = ORDER


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A transformer's directory, and its float8 weights beside it."""
    directory = tmp_path_factory.mktemp("checkpoint")
    transformer = tiny.modules(SIZE, BF16)["transformer"]
    transformer.save_pretrained(directory / "transformer")
    identity = Identity("dev", "tiny", None, fingerprint_of(directory / "transformer"), "0")
    write(directory / "dev.safetensors", transformer, identity)
    return directory


class Opening:
    """Opens the base transformer, and counts."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.times = directory, 0

    def __call__(self) -> nn.Module:
        self.times += 1
        return load_transformer("dev", self.directory, BF16)


def make(
    checkpoint: Path,
    *,
    ready_made: bool,
    device: torch.device = CPU,
    placement: Placement | None = None,
) -> tuple[Transformers, Opening]:
    directory = checkpoint / "transformer"
    model, opening = load_skeleton("dev", directory, BF16), Opening(directory)
    files = Prequantized(checkpoint / "dev.safetensors", model, directory) if ready_made else None
    base_weights = {
        name: BaseWeights(name, model, opening, directory, files) for name in ("dev", "schnell")
    }
    return Transformers(
        base_weights,
        device,
        dynamic=False,
        budget=None,
        placement=placement,
        precisions=("fp8",),
    ), opening


def assert_same(one: Transformers, other: Transformers) -> None:
    assert_bits(one.modules[DEV8], other.modules[DEV8])


def test_whatever_follows_the_bits_are_those_of_quantizing_the_base(checkpoint, adapters) -> None:
    one, two = adapters["a"], adapters["d"]
    quick, opening = make(checkpoint, ready_made=True)
    usual, _ = make(checkpoint, ready_made=False)
    for desired in ([], [(one, 1.0)], [(two, 0.5), (one, -1.0)], []):
        written = [t.reconcile(DEV8, desired).merged for t in (quick, usual)]
        assert written[0] == written[1]
        assert_same(quick, usual)
        assert opening.times == (1 if desired or opening.times else 0)
    assert opening.times == 1


def test_offloaded_weights_come_from_the_file_too(checkpoint, adapters, monkeypatch) -> None:
    usual, _ = make(checkpoint, ready_made=False)
    Streams(monkeypatch)
    quick, opening = make(checkpoint, ready_made=True, placement=OnHost(CPU))
    for desired in ([], [(adapters["a"], 1.0)], []):
        for transformers in (quick, usual):
            transformers.reconcile(DEV8, desired)
        assert_same(quick, usual)
        assert opening.times == (1 if desired or opening.times else 0)


class CancelledError(Exception):
    pass


@pytest.mark.parametrize("stop", [0, 1, 20, 60])
def test_a_cancel_while_it_comes_heals_at_the_next_request(checkpoint, adapters, stop) -> None:
    quick, opening = make(checkpoint, ready_made=True)
    usual, _ = make(checkpoint, ready_made=False)
    calls = iter(range(stop + 1))

    def check() -> None:
        if next(calls) == stop:
            raise CancelledError

    with pytest.raises(CancelledError):
        quick.reconcile(DEV8, [], check)
    assert quick.resident == ()
    assert all(p.is_meta for p in quick.modules[DEV8].parameters())
    for desired in ([], [(adapters["a"], 1.0)]):
        for transformers in (quick, usual):
            transformers.reconcile(DEV8, desired)
        assert_same(quick, usual)
    assert opening.times == 1


def test_once_the_base_is_open_it_serves_and_not_the_file(checkpoint) -> None:
    quick, opening = make(checkpoint, ready_made=True)
    usual, _ = make(checkpoint, ready_made=False)
    quick.reconcile(DEV, [])
    quick.reconcile(DEV8, [])
    usual.reconcile(DEV8, [])
    assert_same(quick, usual)
    rows = {row.name: row.source for row in quick.entries()}
    assert rows["dev fp8"] == "dev base weights"
    assert opening.times == 1


def test_a_base_copy_that_cannot_be_opened_fails_the_request_alone(
    checkpoint, adapters, tmp_path
) -> None:
    quick, opening = make(checkpoint, ready_made=True)
    opening.directory = tmp_path / "unmounted"
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"dev transformer: cannot load .*unmounted"):
            quick.reconcile(DEV8, [(adapters["a"], 1.0)])
    opening.directory = checkpoint / "transformer"
    usual, _ = make(checkpoint, ready_made=False)
    for desired in ([(adapters["a"], 1.0)], []):
        for transformers in (quick, usual):
            transformers.reconcile(DEV8, desired)
        assert_same(quick, usual)


@pytest.mark.gpu
def test_on_a_gpu(checkpoint, adapters) -> None:
    """Files are quantized on a CPU, and the base weights where they serve: to the same bits."""
    quick, usual = (
        make(checkpoint, ready_made=ready_made, device=torch.device("cuda"))[0]
        for ready_made in (True, False)
    )
    for desired in ([], [(adapters["a"], 1.0)], []):
        for transformers in (quick, usual):
            transformers.reconcile(DEV8, desired)
        assert_same(quick, usual)
