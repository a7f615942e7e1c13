"""What the miniature should reach, read from the evaluation's tables."""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

Row = Mapping[str, Any]
Tables = Mapping[str, Sequence[Row]]
Check = Callable[[Sequence[Row]], tuple[str, bool]]


def goals(tables: Tables) -> list[dict[str, str]]:
    """A row for every goal whose table there is."""
    rows = []
    for text, table, check in GOALS:
        if tables.get(table):
            measured, met = check(tables[table])
            rows.append({"goal": text, "measured": measured, "met": "yes" if met else "**no**"})
    return rows


def _at_least(column: str, least: float, **which: Any) -> Check:
    """The lowest value of a column, over the rows whose other columns are as given."""

    def check(rows: Sequence[Row]) -> tuple[str, bool]:
        lowest = min(row[column] for row in rows if which.items() <= row.items())
        return f"{lowest:g}", lowest >= least

    return check


def _rising(column: str, by: float, *, slack: float = 0.0) -> Check:
    """A column that rises by so much in all, and falls nowhere by more than `slack`."""

    def check(rows: Sequence[Row]) -> tuple[str, bool]:
        values = [row[column] for row in rows]
        rises = all(after >= before - slack for before, after in pairwise(values))
        return ", ".join(f"{value:g}" for value in values), rises and values[-1] - values[0] >= by

    return check


def _along_scales(adapter: str, weights: str, sign: int, by: float) -> Check:
    """The effect of an adapter at scales 0, 0.5 and 1: it grows, if `sign` is -1 downwards."""

    def check(rows: Sequence[Row]) -> tuple[str, bool]:
        row = next(r for r in rows if (r["adapter"], r["weights"]) == (adapter, weights))
        effects = [row[f"scale {scale}"] for scale in (0, 0.5, 1)]
        _, met = _rising("effect", by)([{"effect": sign * effect} for effect in effects])
        return ", ".join(f"{effect:g}" for effect in effects), met

    return check


DEV, DIFFERENCE = {"model": "dev", "size": "all"}, {"model": "schnell minus dev"}
RENDERS = {"pictures": "renders"}
GOALS: tuple[tuple[str, str, Check], ...] = (
    ("the measure's shapes right on renders, 95 % at every size", "measure",
     _at_least("shape %", 95, **RENDERS)),
    ("one object: background right, 98 %", "prompts", _at_least("background %", 98, **DEV)),
    ("one object: its colour right, 90 %", "prompts", _at_least("object's colour %", 90, **DEV)),
    ("one object: its shape right, 80 %", "prompts", _at_least("shape %", 80, **DEV)),
    ("two objects: both colours there, 60 %", "pairs", _at_least("both colours %", 60, **DEV)),
    ("schnell's background within 10 points of dev's", "prompts",
     _at_least("background %", -10, **DIFFERENCE)),
    ("schnell's object's colour within 10 points", "prompts",
     _at_least("object's colour %", -10, **DIFFERENCE)),
    ("schnell's shape within 10 points", "prompts", _at_least("shape %", -10, **DIFFERENCE)),
    ("contrast rises with guidance", "guidance", _rising("contrast", 0.3)),
    ("distance to the picture rises with prompt_strength", "strength",
     _rising("distance to the picture (of 255)", 20)),
    ("the prompt's colours gain with prompt_strength", "strength",
     _rising("colours of the prompt %", 50, slack=5)),
    ("the mask gets the named object's colour, 80 %", "inpainting",
     _at_least("named colour in the mask %", 80, prompt_strength=1.0)),
    ("`inverted` takes the contrast down, bf16", "adapters",
     _along_scales("inverted", "bf16", -1, 1.0)),
    ("`inverted` takes the contrast down, fp8", "adapters",
     _along_scales("inverted", "fp8", -1, 1.0)),
    ("`outline` empties the object, bf16", "adapters", _along_scales("outline", "bf16", 1, 0.4)),
    ("`outline` empties the object, fp8", "adapters", _along_scales("outline", "fp8", 1, 0.4)),
)  # fmt: skip
