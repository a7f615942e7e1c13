import pytest
import torch
from torch import nn

from tests.flux.merging import SIZE, WIDTH, lora
from tests.support import tiny


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def base_weights(request) -> dict[str, nn.Module]:
    return tiny.transformers(request.param)


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> list:
    directory = tmp_path_factory.mktemp("adapters")
    found = tiny.modules(SIZE)
    block = "double_blocks.0.img_attn"
    dora = {f"{block}.qkv.dora_scale": torch.full((1, WIDTH), 0.7)}
    bias = {f"{block}.proj.diff_b": torch.full((WIDTH,), 0.25)}
    files = [
        lora("single_blocks.1.linear1", 7 * WIDTH, WIDTH, 4, 1) | lora("img_in", WIDTH, 16, 4, 2),
        lora(f"{block}.qkv", 3 * WIDTH, WIDTH, 4, 3) | dora | bias,
    ]
    return [
        tiny.load(directory / str(number), found, tensors, digest=str(number))
        for number, tensors in enumerate(files)
    ]
