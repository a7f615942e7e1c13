"""The documentation: every link leads somewhere, and what it names is there."""

import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest

from weights.serving.settings import Settings

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "weights" / "README.md"]
LINK = re.compile(r"\]\(([^)\s]+)\)")
FILE = re.compile(r"`((?:flux|lora|safety|weights|script|tests)/[\w./-]*\w|predict\.py)`")

MADE_BY_COMMANDS = {"weights/official", "weights/quantized"}


def anchors(page: Path) -> set[str]:
    """The anchors that a Markdown page offers, one for each heading, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for link in LINK.findall(page.read_text()):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_that_is_named_exists(page: Path) -> None:
    for name in set(FILE.findall(page.read_text())) - MADE_BY_COMMANDS:
        module = ROOT / f"{name}.py"
        assert (ROOT / name).exists() or module.exists(), name


def test_the_way_of_a_request_is_six_lines_each_in_a_file() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    way = page.split("## The way of a request")[1].split("\n## ")[0]
    lines = re.findall(r"^\d\. .*$", way, re.MULTILINE)
    assert len(lines) == 6
    for line in lines:
        (name,) = re.findall(r"`([\w/]+\.py)`", line)
        assert (ROOT / name).is_file(), name


def test_every_test_that_the_page_on_reliability_names_exists() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page)
    assert len(named) > 20
    for file, test in named:
        assert re.search(rf"^def {test}\(", (ROOT / file).read_text(), re.MULTILINE), test


def test_every_page_is_one_click_from_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    for page in PAGES[1:]:
        assert f"({page.relative_to(ROOT)})" in text


def test_every_setting_is_documented() -> None:
    text = (ROOT / "docs" / "settings.md").read_text()
    for setting in fields(Settings):
        assert f"`{setting.metadata['variable']}`" in text


def test_the_health_command_is_the_one_that_container_check_runs() -> None:
    source = (ROOT / "script" / "containers" / "check.py").read_text()
    (command,) = (
        ast.literal_eval(node.value)
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "HEALTH"
    )
    assert command.replace('"', '\\"') in (ROOT / "docs" / "deploy.md").read_text()
