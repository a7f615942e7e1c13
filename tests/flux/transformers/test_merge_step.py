"""A step with adapters is the step without: same modules, operators and graphs."""

import copy

import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from flux.transformers.merge import WorkingWeights
from tests.flux.merging import SIZE
from tests.support import tiny


def inputs(batch=1, tokens=12, text=6):
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(batch, tokens, 16, generator=generator),
        "encoder_hidden_states": torch.randn(batch, text, 24, generator=generator),
        "pooled_projections": torch.randn(batch, 20, generator=generator),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.5]),
        "img_ids": torch.zeros(tokens, 3),
        "txt_ids": torch.zeros(text, 3),
        "return_dict": False,
    }


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def step(transformer):
    with torch.no_grad(), Operators() as seen:
        transformer(**inputs())
    return seen.names, [(name, type(module)) for name, module in transformer.named_modules()]


def test_a_step_is_the_same_operators_and_modules(adapters):
    modules = tiny.modules(SIZE)
    transformer = modules["transformer"]
    operators, tree = step(transformer)
    weights = WorkingWeights(modules)
    for names in ("a", "abcd", ""):
        weights.reconcile([(adapters[name], 0.5) for name in names])
        assert step(transformer) == (operators, tree)
    assert "aten.addmm.default" in operators


def test_compiled_blocks_never_recompile(adapters):
    modules = tiny.modules(SIZE)
    transformer = modules["transformer"]
    uncompiled = copy.deepcopy(modules)
    counter = CompileCounterWithBackend("aot_eager")
    for block in (transformer.transformer_blocks[0], transformer.single_transformer_blocks[0]):
        block.compile(backend=counter)
    weights, reference = WorkingWeights(modules), WorkingWeights(uncompiled)
    with torch.no_grad():
        base = transformer(**inputs())[0].clone()
        frames = counter.frame_count
        assert frames == 2
        for names in ("a", "b", "c", "d", "ab", "cd", "abcd"):
            for each in (weights, reference):
                each.reconcile([(adapters[name], 0.5) for name in names])
            out = transformer(**inputs())[0]
            expected = uncompiled["transformer"](**inputs())[0]
            torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)
            assert not torch.allclose(out, base, rtol=1e-3, atol=1e-3)
        weights.reconcile([])
        assert torch.equal(transformer(**inputs())[0], base)
    assert counter.frame_count == frames
