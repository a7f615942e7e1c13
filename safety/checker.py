"""The interface that every checker shares, and the rule that a broken checker passes nothing."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from PIL import Image

logger = logging.getLogger(__name__)


class SafetyError(ValueError):
    """No image of a request may be delivered."""


class CheckerError(RuntimeError):
    """A checker that cannot be loaded; the message says what to do."""


@dataclass(frozen=True)
class Verdict:
    """Whether an image is withheld, and the scores that led to it (by name; higher is worse)."""

    flagged: bool
    scores: Mapping[str, float] = field(default_factory=dict)


class Checker(Protocol):
    """Looks at an image as it will be delivered; changes nothing."""

    def check(self, image: Image.Image) -> Verdict:
        """Judge an RGB image of any size."""


def judge(checker: Checker, image: Image.Image) -> Verdict:
    """A checker's verdict on an image; flagged if the checker raises or gives no number."""
    try:
        verdict = checker.check(image)
    except Exception:
        logger.exception("The safety checker failed; the image is withheld")
        return Verdict(flagged=True)
    if not all(math.isfinite(score) for score in verdict.scores.values()):
        logger.error("The safety checker gave no finite score; the image is withheld")
        return Verdict(flagged=True, scores=verdict.scores)
    return verdict
