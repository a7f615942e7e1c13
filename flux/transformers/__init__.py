"""The transformers: base weights, the weights that serve, and adapters merged into them."""
