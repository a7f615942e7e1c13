"""The policies over the flags of their checkers, without the checkers."""

from itertools import product
from pathlib import Path

import pytest
from PIL import Image

from safety.checker import Verdict
from safety.policy import POLICIES, CombinedChecker, parts_of
from weights.serving.settings import Settings

IMAGE = Image.new("RGB", (8, 8))


class Flag:
    def __init__(self, name: str, flagged: bool) -> None:
        self._name, self._flagged = name, flagged

    def check(self, _: Image.Image) -> Verdict:
        return Verdict(self._flagged, {self._name: float(self._flagged)})


@pytest.mark.parametrize(("compvis", "falconsai"), [*product([False, True], repeat=2)])
@pytest.mark.parametrize("name", ["official", "any"])
def test_two_checkers(name: str, compvis: bool, falconsai: bool) -> None:
    """docs/settings.md: `official` withholds what both flag, `any` what one does."""
    policy = POLICIES[name]
    checkers = [Flag("compvis", compvis), Flag("falconsai", falconsai)]
    verdict = CombinedChecker(policy, checkers).check(IMAGE)
    assert verdict.flagged == (
        compvis and falconsai if name == "official" else compvis or falconsai
    )
    asked = {"compvis", "falconsai"} if name == "any" or compvis else {"compvis"}
    assert set(verdict.scores) == asked  # Falconsai's is asked only about what CompVis' flags


@pytest.mark.parametrize("flagged", [False, True])
def test_one_checker(flagged: bool) -> None:
    for name in ("compvis", "falconsai", "open_nsfw"):
        assert (
            CombinedChecker(POLICIES[name], [Flag(name, flagged)]).check(IMAGE).flagged == flagged
        )


@pytest.mark.parametrize(
    ("policy", "checkpoint", "parts"),
    [
        ("auto", "nano", []),
        ("auto", "official", ["safety/compvis", "safety/falconsai"]),
        ("auto", "plain", []),
        ("auto", "guarded", ["safety/compvis", "safety/falconsai"]),
        ("falconsai", "nano", ["safety/falconsai"]),
        ("open_nsfw", "official", []),
    ],
)
def test_what_must_be_fetched(tmp_path: Path, policy: str, checkpoint: str, parts: list) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "guarded" / "safety").mkdir(parents=True)
    path = checkpoint if checkpoint in ("nano", "official") else str(tmp_path / checkpoint)
    assert parts_of(Settings(safety_policy=policy), path) == parts
