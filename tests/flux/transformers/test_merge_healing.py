"""Whatever stops a merge, the next request finds the weights it asked for."""

import pytest
import torch

from flux.transformers.merge import UNKNOWN, WorkingWeights
from tests.flux.merging import SIZE, Counted, assert_bits, fresh, state
from tests.support import tiny


@pytest.mark.parametrize("after", ["the same", "another", "nothing"])
def test_a_fault_at_any_parameter_heals_at_the_next_request(adapters, after):
    modules = tiny.modules(SIZE, torch.bfloat16)
    before = state(modules)
    first, second = [(adapters["a"], 1.0)], [(adapters["b"], 0.5), (adapters["d"], 0.5)]
    then = {"the same": second, "another": [(adapters["c"], 1.0)], "nothing": []}[after]
    expected = fresh(modules, then)
    # a's own are restored, b's and d's written
    writes = len(adapters["a"].parameters | adapters["b"].parameters | adapters["d"].parameters)
    for index in range(writes):
        store = Counted()
        weights = WorkingWeights(modules, store=store)
        weights.reconcile(first)
        store.fail_at = len(store.pointers) + index
        with pytest.raises(MemoryError, match="injected"):
            weights.reconcile(second)
        assert UNKNOWN in [weights.record(*key) for key in before]
        weights.reconcile(then)
        assert_bits(state(modules), expected)
        weights.reconcile([])
        assert_bits(state(modules), before)


class CancelledError(Exception):
    pass


def test_a_cancel_at_any_parameter_heals_at_the_next_request(modules, adapters):
    before = state(modules)
    desired = [(adapters["b"], 0.5), (adapters["d"], 0.5)]
    merged = fresh(modules, desired)
    writes = len(adapters["b"].parameters | adapters["d"].parameters)
    for index in range(writes):
        calls = iter(range(writes))

        def check(calls=calls, index=index):
            if next(calls) == index:
                raise CancelledError

        weights = WorkingWeights(modules)
        with pytest.raises(CancelledError):
            weights.reconcile(desired, check)
        assert sum(weights.record(*key) != () for key in before) == index
        if index % 2:
            assert weights.reconcile(desired).merged == writes - index
            assert_bits(state(modules), merged)
        weights.reconcile([])
        assert_bits(state(modules), before)


def test_a_failing_adapter_leaves_the_weights_alone_and_heals(modules, adapters):
    class Failing:
        digest, parameters = "e", adapters["a"].parameters

        def add_to(self, *_):
            raise RuntimeError("broken factors")

    before = state(modules)
    weights = WorkingWeights(modules)
    with pytest.raises(RuntimeError, match="broken"):
        weights.reconcile([(Failing(), 1.0)])
    assert_bits(state(modules), before)
    with pytest.raises(RuntimeError, match="half-written"):
        [weights.fingerprint(component) for component in modules]
    weights.reconcile([])
    assert weights.fingerprint("transformer") == ()
