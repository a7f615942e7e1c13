"""LoRA adapters: references, sources, file formats and the cached loader."""
