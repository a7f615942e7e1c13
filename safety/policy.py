"""The safety policies as data: which checkers run, and which verdicts withhold an image."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image

from safety.checker import Checker, CheckerError, Verdict
from safety.open_nsfw import MODEL, OpenNSFW
from weights.checkpoint import directory_of, root_of
from weights.manifest import REPOSITORIES
from weights.serving.errors import sentences
from weights.serving.inventory import Inventory
from weights.serving.settings import SafetyPolicy, Settings

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Policy:
    """A rule over the flags of some checkers.

    Attributes:
        withholds: `all` or `any` of the flags.
        in_turn: a checker is asked only about what those before it flag, so that it can clear an
            image but not condemn one.
    """

    checkers: tuple[str, ...]
    withholds: Callable[[Iterable[bool]], bool] = all
    in_turn: bool = False


POLICIES: Mapping[SafetyPolicy, Policy] = {
    "official": Policy(("compvis", "falconsai"), all, in_turn=True),
    "any": Policy(("compvis", "falconsai"), any),
    "compvis": Policy(("compvis",)),
    "falconsai": Policy(("falconsai",)),
    "open_nsfw": Policy(("open_nsfw",)),
}


class CombinedChecker:
    """Several checkers under a policy, in the policy's order; itself a checker."""

    def __init__(self, policy: Policy, checkers: Sequence[Checker]) -> None:
        self._policy, self._checkers = policy, checkers

    def check(self, image: Image.Image) -> Verdict:
        """Judge an image; the scores are those of the checkers that were asked."""
        flags: list[bool] = []
        scores: dict[str, float] = {}
        for checker in self._checkers:
            verdict = checker.check(image)
            flags.append(verdict.flagged)
            scores |= verdict.scores
            if self._policy.in_turn and not verdict.flagged:
                break
        return Verdict(self._policy.withholds(flags), scores)


def parts_of(settings: Settings, checkpoint: str) -> list[str]:
    """The parts of weights/manifest.py that load_checker will ask for."""
    checkers = POLICIES[_policy_name(settings, checkpoint)].checkers
    return [part for checker in checkers if (part := f"safety/{checker}") in REPOSITORIES]


def load_checker(
    settings: Settings,
    checkpoint: str,
    device: "torch.device",
    inventory: Inventory,
) -> Checker:
    """Load what the settings ask for, and list it; what is not there yet is fetched.

    Raises:
        WeightsError: if a checker cannot be fetched.
        CheckerError: if one is broken. It is never replaced by another.
    """
    name = _policy_name(settings, checkpoint)
    policy = POLICIES[name]
    logger.info("safety policy %s: %s", name, ", ".join(policy.checkers))
    if name == "open_nsfw" and settings.safety_policy == "auto" and checkpoint != "nano":
        logger.warning(
            "This checkpoint brings no safety checkers, so open_nsfw looks at its images. "
            "FLUX_SAFETY_POLICY=official fetches the official ones."
        )
    if policy.checkers == ("open_nsfw",):
        with inventory.loading("safety open_nsfw", MODEL):
            return OpenNSFW(settings.nsfw_threshold)
    from safety.official import CompVis, Falconsai

    kinds: dict[str, type[CompVis] | type[Falconsai]] = {
        "compvis": CompVis,
        "falconsai": Falconsai,
    }
    checkers: list[Checker] = []
    for checker in policy.checkers:
        part = f"safety/{checker}"
        directory = directory_of(part, checkpoint, settings)
        try:
            with inventory.loading(f"safety {checker}", directory) as tensors:
                loaded = kinds[checker](directory, device)
                tensors.extend(loaded.parameters())
        except CheckerError as error:
            problem = f"Safety checker {checker}: {error}"
            raise CheckerError(sentences(problem, REPOSITORIES[part].remedy)) from error
        checkers.append(loaded)
    return CombinedChecker(policy, checkers)


def _policy_name(settings: Settings, checkpoint: str) -> SafetyPolicy:
    """The policy by name, `auto` resolved: what a checkpoint brings decides."""
    if settings.safety_policy != "auto":
        return settings.safety_policy
    if checkpoint == "nano":
        return "open_nsfw"
    if checkpoint == "official" or (root_of(checkpoint, settings) / "safety").is_dir():
        return "official"
    return "open_nsfw"
