"""Adapters for the miniature."""

import torch
from diffusers import FluxTransformer2DModel

from flux.deployment import NANO


def adapter(seed: int, *, blocks: int = 2) -> dict[str, torch.Tensor]:
    """A rank-4 LoRA for the miniature, in ai-toolkit's spelling, strong enough to see."""
    model = FluxTransformer2DModel.from_pretrained(NANO / "dev", subfolder="transformer")
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".attn.to_" in name:
            if int(name.split(".")[1]) >= blocks:
                continue
            rows, columns = module.weight.shape
            down = torch.randn(4, columns, generator=generator) / columns**0.5
            tensors[f"transformer.{name}.lora_A.weight"] = down
            tensors[f"transformer.{name}.lora_B.weight"] = torch.randn(
                rows, 4, generator=generator
            ).mul(0.2)
    return tensors
