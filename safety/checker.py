"""The interface of the checkers, and the rule that a failing checker withholds the image."""

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
    """Whether an image is withheld, and why.

    Attributes:
        scores: what led to it, by name; higher is worse.
        failed: whether the checker itself failed, which withholds the image too.
    """

    flagged: bool
    scores: Mapping[str, float] = field(default_factory=dict)
    failed: bool = False


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
        return Verdict(flagged=True, failed=True)
    if not all(math.isfinite(score) for score in verdict.scores.values()):
        logger.error("The safety checker gave no finite score; the image is withheld")
        return Verdict(flagged=True, scores=verdict.scores, failed=True)
    return verdict


class Inspection:
    """What a checker says of the images of one request, in order.

    Args:
        checker: None passes everything, for a request that may skip the check.
        count: how many images there will be, for the log.

    Attributes:
        worst: the highest score of each kind so far.
    """

    def __init__(self, checker: Checker | None, count: int) -> None:
        self.worst: dict[str, float] = {}
        self._checker = checker
        self._count = count
        self._verdicts: list[Verdict] = []

    def passes(self, image: Image.Image) -> bool:
        """Whether the next image, RGB, may be delivered; says in the log what was seen."""
        verdict = judge(self._checker, image) if self._checker else Verdict(flagged=False)
        self._verdicts.append(verdict)
        for name, score in verdict.scores.items():
            if math.isfinite(score):
                self.worst[name] = max(score, self.worst.get(name, score))
        if self._checker:
            scores = ", ".join(f"{name} {score:.3f}" for name, score in verdict.scores.items())
            logger.info(
                "Safety: image %d of %d is %s (%s)",
                len(self._verdicts),
                self._count,
                "WITHHELD" if verdict.flagged else "fine",
                scores or "no score",
            )
        return not verdict.flagged

    def raise_if_none_passed(self) -> None:
        """Raise SafetyError if no image has passed."""
        if all(verdict.failed for verdict in self._verdicts):
            raise SafetyError(
                "The safety checker failed, so no image is delivered; try again, and if that does "
                "not help, its operator finds the reason in the log"
            )
        if all(verdict.flagged for verdict in self._verdicts):
            raise SafetyError(
                "The safety checker withheld every image; try another prompt or another seed"
            )
