"""Inputs that are quick to generate."""

PROMPT = "a red circle on a blue background"
QUICK = {"prompt": PROMPT, "megapixels": "0.25", "num_inference_steps": 2, "seed": 7}
UNCHECKED = {"disable_safety_checker": True}  # for tests of something else
SMALL = {"aspect_ratio": "custom", "width": 256, "height": 256}  # the smallest, in bf16 alone
