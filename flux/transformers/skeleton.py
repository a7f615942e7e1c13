"""Transformers without memory for weights, the bytes that these take, and how they are put in."""

import copy

from torch import Tensor, nn

from weights.serving.inventory import size_of


def skeleton(base: nn.Module) -> nn.Module:
    """A module like `base`, with parameters of its shapes and dtype, and no memory."""
    return copy.deepcopy(base).to("meta").eval().requires_grad_(False)


def size(module: nn.Module, float8: frozenset[str]) -> int:
    """Bytes of a transformer's weights with some of them in float8, a scale for each row."""
    return sum(
        parameter.numel() + 4 * parameter.shape[0] if name in float8 else size_of([parameter])
        for name, parameter in module.named_parameters()
    )


def set_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    """Put a value where a module has the parameter of this name."""
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
