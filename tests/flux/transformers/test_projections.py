"""Query, key and value as one product: diffusers' own, with weights that keep their names."""

import pytest
import torch
from torch import nn

from flux.memory.offload import OnHost
from flux.memory.residency import ORDER
from flux.transformers.float8 import float8_parameters, storage
from flux.transformers.pool import Transformers
from flux.transformers.projections import Projection
from flux.transformers.skeleton import size
from tests.flux.pools import CPU, DEV, DEV8, freshly_merged, make
from tests.flux.transformers.test_merge_step import Operators, inputs
from tests.support import tiny

PRODUCTS = {"transformer_blocks.0": 10, "single_transformer_blocks.0": 4}
"""With 14 and 6 linears: two joined products in a double block, one in a single block."""


def outputs(transformer: nn.Module) -> torch.Tensor:
    given = {
        name: value.to(transformer.dtype) if torch.is_tensor(value) else value
        for name, value in inputs().items()
    }
    with torch.no_grad():
        return transformer(**given)[0]


def test_with_adapters_it_is_diffusers_own_to_the_bit(base_weights, pair) -> None:
    transformers = make(base_weights)
    for desired in ([(pair[1], 0.8)], [(pair[0], 1.0), (pair[1], -0.5)], []):
        transformers.reconcile(DEV, desired)
        expected = freshly_merged(base_weights["dev"], desired, float8=False).to(
            base_weights["dev"].dtype
        )
        expected.fuse_qkv_projections()
        assert torch.equal(outputs(transformers.modules[DEV]), outputs(expected))


@pytest.mark.parametrize("dynamic", [False, True])
def test_in_float8_each_row_keeps_its_scale(base_weights, pair, dynamic) -> None:
    """Offloaded transformers multiply three times."""
    here = make(base_weights, dynamic=dynamic)
    there = Transformers(
        tiny.opened(base_weights), CPU, dynamic=dynamic, budget=None, placement=OnHost(CPU)
    )
    for transformers in (here, there):
        transformers.reconcile(DEV8, [(pair[1], 1.0)])
    joined, separate = (outputs(each.modules[DEV8]) for each in (here, there))
    torch.testing.assert_close(joined, separate, rtol=2**-6, atol=2**-6)
    assert joined.std() > 0.1


def test_a_block_multiplies_once_for_query_key_and_value(base_weights) -> None:
    transformers = make(base_weights)
    transformers.reconcile(DEV, [])
    module = transformers.modules[DEV]
    counts: dict[str, int] = {}
    for name in PRODUCTS:
        module.get_submodule(name).register_forward_pre_hook(lambda *_: seen.names.clear())
        module.get_submodule(name).register_forward_hook(
            lambda *_, name=name: counts.update({name: seen.names.count("aten.addmm.default")})
        )
    with Operators() as seen:
        outputs(module)
    assert counts == PRODUCTS


def test_weights_are_held_once_and_leave_as_a_whole(base_weights) -> None:
    transformers = make(base_weights, budget=size(base_weights["dev"], frozenset()))
    for key in ORDER:
        transformers.reconcile(key, [])
        for other, module in transformers.modules.items():
            found = [*module.parameters(), *joined_tensors(module)]
            held = [part for tensor in found for part in storage(tensor) if not part.is_meta]
            memory = [part.untyped_storage() for part in held]
            taken = sum({each.data_ptr(): each.nbytes() for each in memory}.values())
            float8 = float8_parameters(module) if other.precision == "fp8" else frozenset()
            assert taken == (size(module, float8) if other in transformers.resident else 0)
    assert transformers.resident == (ORDER[-1],)


def joined_tensors(module: nn.Module) -> list[torch.Tensor]:
    joined = [part for part in module.modules() if isinstance(part, Projection)]
    assert joined
    return [tensor for part in joined for tensor in part.buffers()]


def test_a_checkpoint_of_it_has_the_usual_names(base_weights) -> None:
    transformers = make(base_weights)
    transformers.reconcile(DEV, [])
    state = transformers.modules[DEV].state_dict()
    assert state.keys() == base_weights["dev"].state_dict().keys()
