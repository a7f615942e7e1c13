"""Compile the kernels for cards, and look at what they come to; test_lora_kernel.py runs this.

Writes the capability of each kind of card for which all went well.
"""

import sys

from triton import compile as compiled
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flux.transformers import lora_kernel
from flux.transformers.float8 import LARGEST, TINY

POINTERS = {"base": "*bf16", "scales": "*fp32", "amplitudes": "*fp32"}
SIZES = ("rows", "columns", "rank", "changed")


def assembly(kernel, capability, depth, factors, working, multiple):
    tile = lora_kernel.FLOAT8_TILE if working == "*fp8e4nv" else lora_kernel.TILE
    constants = {"ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": depth}
    constants |= {"LARGEST": LARGEST, "TINY": TINY}
    known = POINTERS | {"up": factors, "down": factors, "working": working, "values": working}
    known |= dict.fromkeys(SIZES, "i32") | dict.fromkeys(constants, "constexpr")
    signature = {name: known[name] for name in kernel.arg_names}
    divisible = [
        (index,)
        for index, name in enumerate(signature)
        if signature[name].startswith("*") or (multiple and name in SIZES)
    ]
    source = ASTSource(
        kernel,
        signature,
        {(i,): constants[name] for i, name in enumerate(signature) if name in constants},
        {index: [["tt.divisibility", 16]] for index in divisible},
    )
    target = GPUTarget("cuda", capability, 32)
    return compiled(source, target=target, options={"num_warps": tile.warps}).asm["ptx"]


def main():
    for capability in (80, 90):
        for depth, factors, multiple in zip(
            lora_kernel.DEPTHS, ("*bf16", "*fp32"), (True, False), strict=True
        ):
            text = assembly(lora_kernel._rounded, capability, depth, factors, "*bf16", multiple)
            assert "tf32" in text, "products do not use the tensor cores"
            assert "cvt.rn.bf16x2.f32" in text or "cvt.rn.bf16.f32" in text
            if divmod(capability, 10) < lora_kernel.ROUNDS_ONCE_CAPABILITY:
                continue
            text = assembly(
                lora_kernel._quantized, capability, depth, factors, "*fp8e4nv", multiple
            )
            assert "tf32" in text
            assert "cvt.rn.satfinite.e4m3x2.f32" in text, "rounded twice"
            assert "div.rn.f32" in text
            assert "div.full" not in text
        sys.stdout.write(f"{capability}\n")


if __name__ == "__main__":
    main()
