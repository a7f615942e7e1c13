"""Transformers on torch's meta device: how they are made, what they take, how they get memory."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from flux.transformers.projections import join_projections, shared_tensors, split_rows
from weights.serving.inventory import size_of

Make = Callable[[str, torch.Size, torch.dtype], Tensor]
"""Makes memory for the parameter of a name, and for those that share it."""


def skeleton(base: nn.Module, *, joined: bool = False) -> nn.Module:
    """A module like `base`, with parameters of its shapes and dtype, and no memory.

    Args:
        base: a transformer.
        joined: whether it multiplies query, key and value at once; see `join_projections`.
    """
    found = copy.deepcopy(base).to("meta").eval().requires_grad_(False)
    if joined:
        join_projections(found)
    return found


def size(module: nn.Module, float8: frozenset[str]) -> int:
    """Bytes of a transformer's weights with some of them in float8, a scale for each row."""
    return sum(
        parameter.numel() + 4 * parameter.shape[0] if name in float8 else size_of([parameter])
        for name, parameter in module.named_parameters()
    )


def allocate(module: nn.Module, make: Make) -> None:
    """Give every parameter of a module new memory; joined ones get rows of one tensor.

    Args:
        module: a skeleton, or one that has memory already.
        make: called with the first name where several parameters share the memory.
    """
    alone = dict(module.named_parameters())
    for projection, kind, names in shared_tensors(module):
        parts = [alone.pop(name) for name in names]
        counts = [part.shape[0] for part in parts]
        shape = torch.Size([sum(counts), *parts[0].shape[1:]])
        together = make(names[0], shape, parts[0].dtype)
        setattr(projection, kind, together)
        for name, rows in zip(names, split_rows(together, counts), strict=True):
            _set_parameter(module, name, rows)
    for name, parameter in alone.items():
        _set_parameter(module, name, make(name, parameter.shape, parameter.dtype))


def _set_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    """Put a value where a module has the parameter of this name."""
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
