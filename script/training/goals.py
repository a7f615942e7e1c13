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


def _rising(column: str, *, falling: bool = False) -> Check:
    def check(rows: Sequence[Row]) -> tuple[str, bool]:
        values = [row[column] for row in rows]
        sign = -1 if falling else 1
        rises = all(sign * (b - a) >= 0 for a, b in pairwise(values))
        return ", ".join(f"{value:g}" for value in values), rises and values[0] != values[-1]

    return check


def _along_scales(row: int, *, falling: bool) -> Check:
    """The effect at scales 0, 0.5 and 1 in one direction."""

    def check(rows: Sequence[Row]) -> tuple[str, bool]:
        values = [{"effect": rows[row][f"scale {scale}"]} for scale in (0, 0.5, 1)]
        return _rising("effect", falling=falling)(values)

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
    ("contrast rises with guidance", "guidance", _rising("contrast")),
    ("distance to the picture rises with prompt_strength", "strength",
     _rising("distance to the picture (of 255)")),
    ("the prompt's colours gain with prompt_strength", "strength",
     _rising("colours of the prompt %")),
    ("the mask gets the named object's colour, 80 %", "inpainting",
     _at_least("named colour in the mask %", 80, prompt_strength=1.0)),
    ("`inverted` takes the contrast down, bf16", "adapters", _along_scales(0, falling=True)),
    ("`inverted` takes the contrast down, fp8", "adapters", _along_scales(1, falling=True)),
    ("`outline` empties the object, bf16", "adapters", _along_scales(2, falling=False)),
    ("`outline` empties the object, fp8", "adapters", _along_scales(3, falling=False)),
)  # fmt: skip
