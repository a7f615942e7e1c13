"""The command behind script/predict: one prediction through the real server, files written."""

import argparse
import base64
import json
import mimetypes
import subprocess
import sys
from pathlib import Path
from typing import Any

from server import Server, ServerError

SCHEMA = Path(__file__).resolve().parent / "schema"
TRUTHS = {"true": True, "false": False}


class UsageError(ValueError):
    """An argument of the command line that cannot be sent."""


def main() -> int:
    """Run the command; the exit status is 0 only if pictures were written."""
    arguments = _arguments()
    try:
        inputs = dict(_input(argument, _types()) for argument in arguments.input)
        with Server(on_log=_show) as server:
            answer = server.predict(inputs)
    except (UsageError, ServerError) as error:
        print(error, file=sys.stderr)
        return 1
    if answer["status"] != "succeeded":
        print(f"{answer['status']}: {answer.get('error', 'no reason given')}", file=sys.stderr)
        return 1
    for path in _write(answer["output"], arguments.output):
        print(path)
    print(json.dumps(answer["metrics"], indent=2))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="script/predict", description=__doc__)
    parser.add_argument(
        "-i",
        "--input",
        action="append",
        required=True,
        metavar="NAME=VALUE",
        help="an input of the contract; NAME=@FILE sends a file",
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=Path(), metavar="DIR", help="default: here"
    )
    return parser.parse_args()


def _types() -> dict[str, str]:
    """The JSON type of every input."""
    document = json.loads(subprocess.check_output([sys.executable, SCHEMA]))
    properties = document["components"]["schemas"]["Input"]["properties"]
    return {name: schema.get("type", "string") for name, schema in properties.items()}


def _input(argument: str, types: dict[str, str]) -> tuple[str, Any]:
    """One `name=value` as the name and the JSON value that the schema asks for."""
    name, equals, value = argument.partition("=")
    if not equals:
        raise UsageError(f"-i {argument}: expected NAME=VALUE or NAME=@FILE")
    if name not in types:
        raise UsageError(f"-i {argument}: no such input; there are {', '.join(types)}")
    if value.startswith("@"):
        return name, _data_uri(name, Path(value[1:]))
    try:
        match types[name]:
            case "integer":
                return name, int(value)
            case "number":
                return name, float(value)
            case "boolean":
                return name, TRUTHS[value.lower()]
    except (ValueError, KeyError):
        raise UsageError(f"-i {argument}: expected {types[name]}") from None
    return name, value


def _data_uri(name: str, path: Path) -> str:
    try:
        content = base64.b64encode(path.read_bytes()).decode()
    except OSError as error:
        raise UsageError(f"-i {name}=@{path}: {error.strerror}") from error
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return f"data:{kind};base64,{content}"


def _write(outputs: list[str], directory: Path) -> list[Path]:
    """Write data URIs as output.0.webp, output.1.webp, ..."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, uri in enumerate(outputs):
        head, _, content = uri.partition(",")
        suffix = {"image/jpeg": "jpg"}.get(head[5:].split(";")[0]) or head[11:].split(";")[0]
        path = directory / f"output.{number}.{suffix}"
        path.write_bytes(base64.b64decode(content))
        paths.append(path)
    return paths


def _show(line: str) -> None:
    """Show a line of the log; a terminal sees the progress of denoising on one line."""
    moving = "%|" in line and "100%|" not in line
    print(line, end="\r" if moving and sys.stderr.isatty() else "\n", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
