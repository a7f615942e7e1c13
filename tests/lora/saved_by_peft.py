"""An adapter as PEFT's `save_pretrained` writes it, and the strength that a loader gives it."""

import json
from hashlib import sha256
from pathlib import Path

import torch
from huggingface_hub import constants
from safetensors.torch import save

from lora.formats.adapter import Targets, load_adapter
from tests.support import tiny

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
MODULE = "base_model.model.transformer_blocks.0.attn.to_q"
Q = ("transformer", "transformer_blocks.0.attn.to_q.weight")
RANK, ALPHA = 4, 6
SOURCES = ["hub", "path", "tar, config first", "tar, weights first"]


def config(**more):
    return json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, **more}).encode()


class Case:
    """An adapter of one module, a loader of real adapters, and the strength it comes to."""

    def __init__(self, flux, settings, new_loader):
        self.flux, self.settings, self._new_loader = flux, settings, new_loader
        width = flux["transformer"].norm_out.linear.weight.shape[1]
        down, up = tiny.factors(width, width, RANK)
        self.tensors = {f"{MODULE}.lora_A.weight": down, f"{MODULE}.lora_B.weight": up}
        self.weights = save(self.tensors, {"format": "pt"})
        self.files = {WEIGHTS: self.weights, CONFIG: config()}
        self.digest = sha256(self.weights).hexdigest()

    def loader(self):
        targets = Targets(tiny.shapes(self.flux))

        def parse(path, digest, settings):
            return load_adapter(path, digest, targets, settings)

        return self._new_loader(self.settings, parse)

    def strength(self, adapter):
        found = tiny.deltas(adapter, self.flux)[Q].double()
        down, up = (self.tensors[f"{MODULE}.lora_{x}.weight"].double() for x in "AB")
        plain = up @ down
        assert torch.allclose(found, found.norm() / plain.norm() * plain, atol=1e-4)
        return float(found.norm() / plain.norm())

    def load(self, text, *check):
        return self.strength(self.loader().load(text, *check).adapter)

    def stored(self):
        """The files on the disk that are, or hold a part of, an adapter or its configuration."""
        parts = [*self.settings.cache.root.glob("objects/*")]
        parts += self.settings.cache.root.glob("parts/*")
        return [*parts, *Path(constants.HF_HUB_CACHE).rglob("blobs/*")]
