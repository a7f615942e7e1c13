"""docs/adapters.md names every kind, every spelling and every tensor that is read."""

from pathlib import Path

import pytest

from lora.formats.foreign import KINDS
from lora.formats.kinds import LAYOUTS
from lora.formats.spellings import AUXILIARY, BOOKKEEPING, DIALECTS, ROLES

PAGE = Path(__file__).parents[2] / "docs" / "adapters.md"


@pytest.fixture(scope="module")
def text():
    return PAGE.read_text()


def test_every_kind_has_a_row(text):
    kinds = {layout.kind.removeprefix("old ") for layouts in LAYOUTS.values() for layout in layouts}
    assert [kind for kind in sorted(kinds) if f"\n| {kind} | " not in text] == []


def test_every_prefix_is_named(text):
    prefixes = {dialect.prefix for dialect in DIALECTS} - {""}
    assert [prefix for prefix in sorted(prefixes) if f"`{prefix}`" not in text] == []


def test_every_tensor_is_named(text):
    """By its whole name, or without `.weight`; the parts of a LoKr by their ending."""
    missing = []
    for suffix in ROLES:
        name = suffix.removesuffix(".weight")
        shortened = name.removesuffix("_a").removesuffix("_b") if "lokr" in name else name
        if not any(f"`{spelled}`" in text for spelled in (suffix, name, shortened)):
            missing.append(suffix)
    assert missing == []


def test_every_kind_that_is_refused_is_named(text):
    words = ["VeRA", "T-LoRA", "nunchaku", "IP-Adapter", "ControlNet", "sd-scripts"]
    words += ["IA3", "BOFT of PEFT", "Redux"]
    assert len(words) == len(KINDS)
    assert all(word in text for word in words)
    assert all(word in kind for word, (_, kind, _) in zip(words, KINDS, strict=True))


def test_what_trainers_and_tools_add_is_named(text):
    assert all(f"`{name}`" in text for name in [*BOOKKEEPING, AUXILIARY])


def rows(text, title):
    """The cells of a table whose first row begins with `title`, without its rules."""
    lines = text[text.index(f"| {title} |") :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.parametrize("title", ["kind | here", "spelling of a transformer's module | here"])
def test_what_is_counted_is_counted_right(text, title):
    *table, total = rows(text, title)
    assert total[0] == f"read, of {len(table)}"
    for column, said in enumerate(total[1:], 1):
        part = sum(row[column].startswith("part") for row in table)
        read = part + sum(row[column] == "yes" for row in table)
        assert said == (f"{read}, {part} of them in part" if part else str(read))
