"""Adapter files: the formats of trainers, read into deltas of FLUX.1's weights."""
