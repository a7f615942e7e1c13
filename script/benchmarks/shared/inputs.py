"""Inputs of the benchmarks that send predictions to a server."""

SMALL = {"aspect_ratio": "custom", "width": 256, "height": 256}
BASE = {"prompt": "a red circle on a blue background", "seed": 7, "output_format": "png"}
