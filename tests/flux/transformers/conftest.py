import pytest
import torch
from torch import nn

from tests.flux.merging import SIZE, WIDTH
from tests.support import tiny


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def base_weights(request) -> dict[str, nn.Module]:
    return tiny.transformers(request.param)


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> list:
    directory = tmp_path_factory.mktemp("adapters")
    found = tiny.modules(SIZE)

    def lora(module: str, rows: int, columns: int, seed: int) -> dict[str, torch.Tensor]:
        down, up = tiny.factors(rows, columns, 4, seed)
        return {f"{module}.lora_A.weight": 0.1 * down, f"{module}.lora_B.weight": 0.1 * up}

    block = "double_blocks.0.img_attn"
    dora = {f"{block}.qkv.dora_scale": torch.full((1, WIDTH), 0.7)}
    bias = {f"{block}.proj.diff_b": torch.full((WIDTH,), 0.25)}
    files = [
        lora("single_blocks.1.linear1", 7 * WIDTH, WIDTH, 1) | lora("img_in", WIDTH, 16, 2),
        lora(f"{block}.qkv", 3 * WIDTH, WIDTH, 3) | dora | bias,
    ]
    return [
        tiny.load(directory / str(number), found, tensors, digest=str(number))
        for number, tensors in enumerate(files)
    ]
