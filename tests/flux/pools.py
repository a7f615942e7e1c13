"""Working transformers of a tiny FLUX, and ways to compare their weights."""

import copy
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn
from torchao.quantization import Float8WeightOnlyConfig, quantize_

from flux.memory.residency import ORDER
from flux.transformers.float8 import float8_parameters, storage
from flux.transformers.merge import WorkingWeights
from flux.transformers.pool import Transformers
from flux.variants import Key
from lora.formats.adapter import Adapter
from tests.flux import low_rank
from tests.support import tiny

CPU = torch.device("cpu")
DEV, DEV8, SCHNELL8, SCHNELL = ORDER
Desired = list[tuple[Adapter, float]]
Weights = TypeVar("Weights")


def make(base_weights, budget=None, dynamic=False, one_pass=None) -> Transformers:
    opened = tiny.opened(base_weights)
    return Transformers(opened, CPU, dynamic=dynamic, budget=budget, one_pass=one_pass)


def once(make: Callable[[Key, Desired], Weights]) -> Callable[[Key, Desired], Weights]:
    """`make` with its results kept, by the transformer and what is merged into it."""
    made: dict[object, Weights] = {}

    def kept(key: Key, desired: Desired) -> Weights:
        name = (key, *((adapter.digest, scale) for adapter, scale in desired))
        if name not in made:
            made[name] = make(key, desired)
        return made[name]

    return kept


def bits(module: nn.Module) -> dict[str, list[torch.Tensor]]:
    return low_rank.bits(dict(module.named_parameters()))


Bits = dict[str, list[torch.Tensor]]


def assert_same(one: Bits, other: Bits) -> None:
    assert one.keys() == other.keys()
    for name, tensors in one.items():
        assert all(torch.equal(x, y) for x, y in zip(tensors, other[name], strict=True)), name


def assert_bits(a: nn.Module, b: nn.Module) -> None:
    assert_same(bits(a), bits(b))


def on_device(transformers: Transformers) -> list[torch.Tensor]:
    """Everything that the working transformers hold memory for."""
    parameters = [p for module in transformers.modules.values() for p in module.parameters()]
    return [tensor for p in parameters for tensor in storage(p) if not tensor.is_meta]


def freshly_merged(base: nn.Module, desired, *, float8: bool) -> nn.Module:
    """Merged in fp32 by itself and quantized by torchao."""
    dtype = base.dtype
    exact = copy.deepcopy(base).float()
    WorkingWeights({"transformer": exact}).reconcile(desired)
    names = float8_parameters(base) if float8 else frozenset()
    quantize_(exact, Float8WeightOnlyConfig(), lambda _, name: f"{name}.weight" in names)
    for name, parameter in exact.named_parameters():
        if name not in names:
            parameter.data = parameter.data.to(dtype)
    return exact
