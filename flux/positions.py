"""Rotary embeddings computed once for an image, not anew in each of its steps.

diffusers' transformer computes them from the positions of the tokens in every forward pass: 65 of
torch's operators, each of which the host must launch. The positions are the same in all steps.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn


class KeptPositions(nn.Module):
    """In place of a transformer's `pos_embed`; inside of `kept` it computes once.

    Args:
        embed: diffusers' own module.
    """

    def __init__(self, embed: nn.Module) -> None:
        super().__init__()
        self.embed = embed
        self._keeps = False
        self._found: tuple[Tensor, Tensor] | None = None

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, fp32 [tokens, width of a head], of positions [tokens, 3]."""
        if self._found is not None:
            return self._found
        found: tuple[Tensor, Tensor] = self.embed(ids)
        if self._keeps:
            self._found = found
        return found

    @contextmanager
    def kept(self) -> Iterator[None]:
        """A block in which all positions are those of the first call."""
        self._keeps = True
        try:
            yield
        finally:
            self._keeps, self._found = False, None


def keep_positions(transformer: nn.Module) -> KeptPositions:
    """Put KeptPositions in the place of a transformer's own module."""
    kept = transformer.pos_embed = KeptPositions(transformer.pos_embed)  # type: ignore[arg-type]
    return kept
