"""What docs/architecture.md says: who may import whom, and what happens at import."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = {"predict", "flux", "lora", "safety", "weights"}
MAY_IMPORT = {
    "predict": {"flux", "lora", "safety", "weights"},
    "flux": {"flux", "weights"},
    "lora": {"lora", "weights"},
    "safety": {"safety", "weights"},
    "weights": {"weights"},
}


def sources() -> list[Path]:
    files = [ROOT / "predict.py"]
    return files + [f for p in sorted(OURS - {"predict"}) for f in sorted((ROOT / p).rglob("*.py"))]


def imports(path: Path) -> set[str]:
    """The top-level packages that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0].removesuffix(".py")
    assert imports(path) & OURS <= MAY_IMPORT[package]
    assert package == "predict" or "cog" not in imports(path)


@pytest.mark.parametrize(
    "path",
    [
        p
        for p in sources()
        if p.relative_to(ROOT).parts[:2] == ("lora", "sources")
        or p.relative_to(ROOT).parts[0] == "weights"
        or p.name in ("request.py", "loader.py")
    ],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_the_rules_and_the_store_do_not_import_torch(path: Path) -> None:
    assert "torch" not in imports(path)


def test_importing_the_predictor_changes_nothing() -> None:
    """No environment variable set, no logging configured, no large library loaded."""
    command = """
import logging, os, sys
before = dict(os.environ), logging.getLogger().handlers[:], logging.getLogger().level
import predict
assert dict(os.environ) == before[0]
assert (logging.getLogger().handlers, logging.getLogger().level) == before[1:]
assert not {"torch", "diffusers", "transformers"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", command], cwd=ROOT, check=True)
