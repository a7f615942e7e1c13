"""The transformers: base weights, the working weights that serve, adapters merged into them, and precisions."""
