"""What a checker's verdicts mean for the images of a request."""

import pytest
from PIL import Image

from safety.checker import Inspection, SafetyError, Verdict

IMAGE = Image.new("RGB", (8, 8))


class Scores:
    """Gives a score for each image in turn, flagged from 0.5; raises where that is an exception."""

    def __init__(self, *scores: float | Exception) -> None:
        self._scores = iter(scores)

    def check(self, _: Image.Image) -> Verdict:
        score = next(self._scores)
        if isinstance(score, Exception):
            raise score
        return Verdict(score >= 0.5, {"nsfw": score})


def inspected(*scores: float | Exception) -> tuple[Inspection, list[bool]]:
    inspection = Inspection(Scores(*scores), len(scores))
    return inspection, [inspection.passes(IMAGE) for _ in scores]


def test_images_pass_one_by_one_and_the_worst_score_is_kept(caplog) -> None:
    caplog.set_level("INFO")
    inspection, passed = inspected(0.1, 0.9, 0.3)
    assert passed == [True, False, True]
    assert inspection.worst == {"nsfw": 0.9}
    inspection.raise_if_none_passed()
    assert "Safety: image 2 of 3 is WITHHELD (nsfw 0.900)" in caplog.text
    assert "Safety: image 3 of 3 is fine (nsfw 0.300)" in caplog.text


@pytest.mark.parametrize("broken", [RuntimeError("no"), float("nan"), float("-inf")])
def test_a_checker_that_fails_withholds_its_image_and_no_other(broken) -> None:
    for scores in ((broken, 0.2), (0.2, broken)):
        inspection, passed = inspected(*scores)
        assert passed == [score == 0.2 for score in scores]
        assert inspection.worst == {"nsfw": 0.2}
        inspection.raise_if_none_passed()


def test_when_no_image_passes_the_error_says_whether_another_prompt_helps() -> None:
    with pytest.raises(SafetyError, match="withheld every image; try another prompt"):
        inspected(0.8, 0.9)[0].raise_if_none_passed()
    with pytest.raises(SafetyError, match="withheld every image; try another prompt"):
        inspected(0.8, RuntimeError())[0].raise_if_none_passed()
    with pytest.raises(SafetyError, match=r"checker failed, .* operator finds the reason"):
        inspected(RuntimeError(), float("nan"))[0].raise_if_none_passed()


def test_without_a_checker_everything_passes_and_nothing_is_logged(caplog) -> None:
    caplog.set_level("INFO")
    inspection = Inspection(None, 1)
    assert inspection.passes(IMAGE)
    inspection.raise_if_none_passed()
    assert inspection.worst == {}
    assert caplog.text == ""
