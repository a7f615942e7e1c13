"""What the `__metadata__` of a safetensors file tells: adapter settings and trigger words."""

import json
import sys
from collections.abc import Iterator, Mapping
from math import sqrt
from typing import Any

from lora.formats.errors import AdapterError
from lora.formats.spellings import CLIP_LEVEL
from weights.header import short

ADAPTER_SETTINGS = "lora_adapter_metadata"
TRIGGER_FIELDS = (
    "modelspec.trigger_phrase",
    "trigger_phrase",
    "trigger_word",
    "trigger_words",
    "ss_trigger_words",
    "instance_prompt",
)
PATTERN_SYNTAX = frozenset("*+?[](){}|\\$")  # PEFT would read a regular expression
# Initialisations of PEFT that take what the factors begin with out of the model's weights.
CHANGE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
MOST = sys.float_info.max  # of an alpha or a rank; integers in JSON may be larger
MAX_TRIGGERS = 5
MAX_TRIGGER_CHARACTERS = 200


class AdapterSettings:
    """The PEFT configuration that diffusers (0.34 on) and SimpleTuner write into the header.

    A JSON object with one component's settings under each prefix: `transformer.r`,
    `transformer.lora_alpha`, `transformer.alpha_pattern`, `transformer.use_rslora`.

    Raises:
        AdapterError: the entry is there and is not such an object, or the adapter is for weights
            that its training changed.
    """

    def __init__(self, metadata: Mapping[str, str]) -> None:
        settings = _json_object(metadata.get(ADAPTER_SETTINGS, "{}"))
        if settings is None:
            raise AdapterError(f"the file's {ADAPTER_SETTINGS} is not a JSON object")
        self._settings = settings
        for name, value in settings.items():
            if name.endswith("init_lora_weights") and str(value).lower().startswith(CHANGE_BASE):
                raise AdapterError(
                    f"the adapter's init_lora_weights is {short(str(value))}: training began with "
                    "other weights than the model's, and the file does not hold the difference; "
                    "save it with PEFT's path_initial_model_for_weight_conversion, which makes an "
                    "adapter for the model's own weights of it"
                )

    def scaling(self, component: str, module: str, rank: int | None) -> float:
        """What a module without an alpha of its own is multiplied by; 1.0 when nothing is said.

        That is alpha / rank, or alpha / sqrt(rank) for a rank-stabilised adapter.

        Args:
            module: its name in the model, without CLIP_LEVEL.
            rank: of its factors; None if nothing is factored, and the settings' r counts.

        Raises:
            AdapterError: the settings have a rank of 0, as PEFT refuses too, or a bad number.
        """
        if self._get(component, "r") == 0:
            raise AdapterError(
                f"the file's {ADAPTER_SETTINGS} says that the rank (r) of the {component}'s "
                "adapter is 0; export it again with the rank that it was trained with"
            )
        alpha = self._by_pattern(component, module, "alpha_pattern", "lora_alpha", "alpha")
        divisor = rank or self._by_pattern(component, module, "rank_pattern", "r")
        if alpha is None or not isinstance(divisor, int) or divisor < 1:
            return 1.0
        if not isinstance(alpha, int | float) or not 0 < alpha <= MOST or divisor > MOST:
            raise AdapterError(
                f"lora_alpha and rank of {short(module)} must be finite numbers above 0, "
                f"got {short(str(alpha))} and {short(str(divisor))}"
            )
        return float(alpha / (sqrt(divisor) if self._get(component, "use_rslora") else divisor))

    def _by_pattern(self, component: str, module: str, patterns: str, *names: str) -> object:
        """What the patterns of that name say of a module, else the settings of these names."""
        pattern = self._get(component, patterns)
        whole = f"{component}.{module}"  # PEFT's name, if a pipeline was trained
        if isinstance(pattern, dict):
            for name, value in pattern.items():
                plain = name.lstrip("^").removeprefix(CLIP_LEVEL)
                if not PATTERN_SYNTAX.isdisjoint(plain):
                    raise AdapterError(f"{patterns} {short(name)} is not a plain module name")
                anchored = name.startswith("^")
                if plain in (module, whole) or (not anchored and whole.endswith(f".{plain}")):
                    return value
        return self._get(component, *names)

    def _get(self, component: str, *names: str) -> object:
        """The first of these settings that is there; a LoKr or LoHa calls its strength `alpha`."""
        prefixes = (f"{component}.", "") if component == "transformer" else (f"{component}.",)
        found = (self._settings.get(prefix + name) for prefix in prefixes for name in names)
        return next((value for value in found if value is not None), None)


def trigger_words(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """Words that a prompt should contain, as the trainer recorded them; often none.

    kohya's `ss_tag_frequency` counts each caption tag: those that every picture has (more than one
    picture, and no tag is more frequent) are what the training was tied to. ai-toolkit writes its
    trigger word there, as the only tag, with a count of 1.
    """
    found = [metadata[field] for field in TRIGGER_FIELDS if field in metadata]
    found += _commonest_tags(metadata.get("ss_tag_frequency", "{}"))
    cleaned = (" ".join(text.split())[:MAX_TRIGGER_CHARACTERS] for text in found)
    return tuple(dict.fromkeys(text for text in cleaned if text))[:MAX_TRIGGERS]


def _commonest_tags(text: str) -> Iterator[str]:
    counts: dict[str, int] = {}
    for tags in (_json_object(text) or {}).values():
        for tag, count in tags.items() if isinstance(tags, dict) else ():
            if type(count) is int:
                counts[tag] = counts.get(tag, 0) + count
    most = max(counts.values(), default=0)
    return (tag for tag, count in counts.items() if count == most > 1 or len(counts) == 1)


def _json_object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
