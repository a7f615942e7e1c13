"""The public contract: the schema, and the forms that Cog's static generator resolves."""

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    """What script/schema prints."""
    return json.loads(subprocess.check_output([sys.executable, ROOT / "script" / "schema"]))


def without(tree: Any, key: str) -> Any:
    if isinstance(tree, dict):
        return {k: without(v, key) for k, v in tree.items() if k != key}
    return [without(v, key) for v in tree] if isinstance(tree, list) else tree


def resolved(schema: dict[str, Any], components: dict[str, Any]) -> dict[str, Any]:
    """A property with its reference written out."""
    if "allOf" not in schema:
        return schema
    (reference,) = schema["allOf"]
    target = components[reference["$ref"].rpartition("/")[2]]
    own = {key: value for key, value in schema.items() if key != "allOf"}
    return {**target, **own}


def test_inputs_and_output_are_those_of_the_public_page(document) -> None:
    page = json.loads((DATA / "contract.json").read_text())
    components = document["components"]["schemas"]
    properties = components["Input"]["properties"]
    ours = {name: resolved(schema, components) for name, schema in properties.items()}
    hidden = ours.pop("replicate_weights")  # fine-tune pages do not show it
    assert ours == page["Input"]["properties"]
    assert hidden == {**ours["extra_lora"], "title": "Replicate Weights", "x-order": 17}
    assert components["Input"]["required"] == page["Input"]["required"] == ["prompt"]
    assert components["Output"] == page["Output"]
    assert sorted(p["x-order"] for p in properties.values()) == list(range(21))


def test_document_is_what_cog_build_generates_but_for_nullable(document) -> None:
    expected = json.loads((DATA / "openapi-cog-build.json").read_text())
    assert without(document["paths"], "nullable") == expected["paths"]
    assert document["components"] == without(expected["components"], "nullable")
    assert document["openapi"] == expected["openapi"]
    assert document["info"]["title"] == expected["info"]["title"]
    assert "nullable" not in json.dumps(document)


def test_version_in_the_document_is_that_of_the_pinned_cog(document) -> None:
    version = document["info"]["version"]
    assert f"cog=={version}\n" in (ROOT / "requirements.txt").read_text()
    assert f'sdk_version: "{version}"' in (ROOT / "cog.yaml").read_text()


def test_the_build_context_keeps_what_cog_build_copies_the_schema_from() -> None:
    assert not {".cog", ".cog/", ".*"} & set((ROOT / ".dockerignore").read_text().splitlines())


def test_server_serves_this_document(server, document) -> None:
    assert server.server.request("GET", "/openapi.json").json() == document


def input_calls() -> dict[str, tuple[ast.arg, ast.Call]]:
    module = ast.parse((ROOT / "predict.py").read_text())
    (predictor,) = (n for n in module.body if isinstance(n, ast.ClassDef) and n.name == "Predictor")
    (run,) = (n for n in predictor.body if isinstance(n, ast.FunctionDef) and n.name == "run")
    arguments = run.args.args[1:]
    return {a.arg: (a, d) for a, d in zip(arguments, run.args.defaults, strict=True)}


def is_literal(node: ast.expr, kinds: type | tuple[type, ...]) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, kinds)


def constants() -> dict[str, ast.expr]:
    """Names that the file binds exactly once, at top level, to an expression."""
    module = ast.parse((ROOT / "predict.py").read_text())
    bound = [n for n in module.body if isinstance(n, ast.Assign)]
    return {n.targets[0].id: n.value for n in bound if isinstance(n.targets[0], ast.Name)}


@pytest.mark.parametrize("name", input_calls())
def test_input_is_written_in_forms_that_cogs_generator_resolves(name: str) -> None:
    """Each rule names a form that the generator drops, corrupts or refuses otherwise."""
    argument, call = input_calls()[name]
    source = (ROOT / "predict.py").read_text()
    assert isinstance(call, ast.Call)
    assert not call.args, "positional default"
    keywords = {k.arg: k.value for k in call.keywords}
    description = keywords["description"]
    if isinstance(description, ast.Name):
        description = constants()[description.id]
    assert is_literal(description, str)
    written = ast.get_source_segment(source, description) or ""
    assert written.count('"') == 2, "implicit concatenation, or an escaped quote"
    assert "\\" not in written, "escapes are not decoded"
    for limit in {"ge", "le"} & keywords.keys():
        number = keywords[limit]
        number = number.operand if isinstance(number, ast.UnaryOp) else number
        assert is_literal(number, (int, float))
    if "default" in keywords:
        assert is_literal(keywords["default"], (str, int, float, bool))
    if "choices" in keywords:
        choices = keywords["choices"]
        if isinstance(choices, ast.Name):
            choices = constants()[choices.id]
        assert isinstance(choices, ast.List)
        assert all(is_literal(choice, str) for choice in choices.elts)
    optional = isinstance(argument.annotation, ast.BinOp)
    assert optional == ("default" not in keywords and name != "prompt")


def test_cog_loads_the_predictor_without_a_deprecation_warning() -> None:
    command = """
import warnings
from cog.predictor import load_predictor_from_ref
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    load_predictor_from_ref("predict.py:Predictor")
assert not [w for w in seen if "cog" in w.filename or "predict" in str(w.message)], seen
"""
    subprocess.run([sys.executable, "-c", command], cwd=ROOT, check=True)
