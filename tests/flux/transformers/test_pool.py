"""Working transformers: one pass from the base weights, exact in both precisions."""

import random

import pytest
import torch

from flux.memory.pinned import move_parameters
from flux.memory.residency import ORDER
from flux.transformers.pool import Transformers
from tests.flux.pools import (
    DEV,
    DEV8,
    SCHNELL,
    SCHNELL8,
    assert_bits,
    assert_same,
    bits,
    freshly_merged,
    make,
    on_device,
)
from tests.support import tiny


@pytest.mark.parametrize("key", [DEV, DEV8, SCHNELL8, SCHNELL], ids="-".join)
def test_merged_and_quantized_once(base_weights, pair, key) -> None:
    """Whatever was there before, to the bit what torchao makes of a freshly merged model."""
    one, two = pair
    transformers = make(base_weights)
    for desired in ([(one, 0.8), (two, -0.5)], [], [(two, 1.5)], [(one, 0.01)], []):
        for each in ORDER if desired else (key,):
            transformers.reconcile(each, desired)
        expected = freshly_merged(base_weights[key.variant], desired, float8=key.precision == "fp8")
        assert_bits(transformers.modules[key], expected)


def test_swaps_move_no_storage_and_leave_the_base_alone(base_weights, pair) -> None:
    before = {name: bits(base) for name, base in base_weights.items()}
    transformers = make(base_weights)
    for key in ORDER:
        assert transformers.reconcile(key, []).restored == 0  # nothing was merged before
    first = {key: bits(transformers.modules[key]) for key in ORDER}
    pointers = [tensor.data_ptr() for tensor in on_device(transformers)]
    rng = random.Random(0)
    for _ in range(40):
        desired = [(adapter, rng.uniform(-2, 2)) for adapter in rng.sample(pair, 1)]
        transformers.reconcile(rng.choice(ORDER), desired)
    for key in ORDER:
        transformers.reconcile(key, [])
        assert_same(bits(transformers.modules[key]), first[key])
    assert pointers == [tensor.data_ptr() for tensor in on_device(transformers)]
    for name, base in base_weights.items():
        assert_same(bits(base), before[name])


class CancelledError(Exception):
    pass


def test_a_cancel_while_it_comes_heals_at_the_next_request(base_weights, pair) -> None:
    for stop in range(0, 60, 7):
        transformers, calls = make(base_weights), iter(range(60))

        def check(calls=calls, stop=stop) -> None:
            if next(calls) == stop:
                raise CancelledError

        with pytest.raises(CancelledError):
            transformers.reconcile(DEV8, [(pair[0], 1.0)], check)
        transformers.reconcile(DEV8, [(pair[1], 1.0)])
        expected = freshly_merged(base_weights["dev"], [(pair[1], 1.0)], float8=True)
        assert_bits(transformers.modules[DEV8], expected)


@pytest.mark.gpu
def test_on_a_gpu(base_weights, pair) -> None:
    device = torch.device("cuda")
    assert move_parameters(base_weights["dev"], pinned=True)
    transformers = Transformers(tiny.opened(base_weights), device, dynamic=False, budget=None)
    for key in ORDER:
        transformers.reconcile(key, [(pair[1], 1.0)])
        transformers.reconcile(key, [])
        expected = freshly_merged(base_weights[key.variant], [], float8=key.precision == "fp8")
        assert_bits(transformers.modules[key].cpu(), expected)
