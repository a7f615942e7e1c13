"""FLUX.1's two variants as rows of data, and the transformers that serve."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

Precision = Literal["bf16", "fp8"]


class Key(NamedTuple):
    """Which transformer serves: one of a variant, in a precision."""

    variant: str
    precision: Precision


@dataclass(frozen=True)
class Variant:
    """What the rules need to know of a variant; sizes come from the loaded configurations.

    Attributes:
        max_sequence_length: T5 tokens that the variant was trained with.
        guidance: whether the transformer embeds a guidance scale.
    """

    name: str
    max_sequence_length: int
    guidance: bool


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("dev", max_sequence_length=512, guidance=True),
        Variant("schnell", max_sequence_length=256, guidance=False),
    )
}
