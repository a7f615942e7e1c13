"""Adapter files of one module, and what becomes of them."""

import pytest

from lora.adapter import AdapterError
from tests import tiny

TO_Q = "transformer.transformer_blocks.0.attn.to_q"
RANK = 4


def width(flux):
    return flux["transformer"].norm_out.linear.weight.shape[1]


def lora(module, rows, columns, rank=RANK):
    down, up = tiny.factors(rows, columns, rank)
    return {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}


def refused(flux, tmp_path, tensors, match, metadata=None):
    with pytest.raises(AdapterError, match=match):
        tiny.load(tmp_path / "a", flux, tensors, metadata)
