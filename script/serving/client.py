"""The command behind script/predict: one prediction through the real server, files written."""

import argparse
import base64
import json
import math
import mimetypes
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from serving.server import Server, ServerError

SCHEMA = Path(__file__).resolve().parents[1] / "schema"
STOP_SECONDS = 1  # of the server when it has answered, or when nobody waits for its answer
TRUTHS = {"true": True, "false": False}


class UsageError(ValueError):
    """An argument of the command line that cannot be sent."""


def main() -> int:
    """Run the command; the exit status is 0 only if pictures were written."""
    arguments = _arguments()
    for ending in (signal.SIGTERM, signal.SIGHUP):  # as exceptions, they stop the server too
        signal.signal(ending, lambda number, _: sys.exit(128 + number))
    try:
        inputs = _inputs(arguments.input)
        arguments.output.mkdir(parents=True, exist_ok=True)
        with Server(on_log=_show, patience=STOP_SECONDS) as server:
            answer = server.predict(inputs)
        if answer["status"] != "succeeded" or not answer["output"]:
            raise ServerError(f"{answer['status']}: {answer.get('error', 'no output')}")
        for path in _write(answer["output"], arguments.output):
            print(path)
    except (UsageError, ServerError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
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
        help="an input of the contract; NAME=@FILE sends a file (but a prompt may begin with @)",
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=Path(), metavar="DIR", help="default: here"
    )
    return parser.parse_args()


def _inputs(arguments: list[str]) -> dict[str, Any]:
    """The arguments `name=value` as names and JSON values, of the types in the schema."""
    document = json.loads(subprocess.check_output([sys.executable, SCHEMA]))
    schemas = document["components"]["schemas"]["Input"]["properties"]
    inputs: dict[str, Any] = {}
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if not equals:
            raise UsageError(f"-i {argument}: expected NAME=VALUE or NAME=@FILE")
        if name not in schemas:
            raise UsageError(f"-i {argument}: no such input; there are {', '.join(schemas)}")
        if name in inputs:
            raise UsageError(f"-i {argument}: {name} is given twice")
        inputs[name] = _value(name, text, schemas[name])
    return inputs


def _value(name: str, text: str, schema: dict[str, Any]) -> Any:
    if text.startswith("@") and name != "prompt":
        return _data_uri(name, Path(text[1:]))
    if schema.get("format") == "uri" and not text.startswith(("http://", "https://", "data:")):
        raise UsageError(f"-i {name}={text}: expected a URL; a file is sent as {name}=@{text}")
    kind = schema.get("type", "string")
    try:
        if kind == "boolean":
            return TRUTHS[text.lower()]
        if kind in ("integer", "number"):
            return _number(text, kind)
        text.encode()
    except (ValueError, KeyError, OverflowError):
        raise UsageError(f"-i {name}={text!r}: expected {kind}") from None
    return text


def _number(text: str, kind: str) -> float:
    with suppress(ValueError):
        return int(text)  # a seed has more digits than a float keeps
    number = float(text)
    if number.is_integer():
        return int(number)
    if kind == "integer" or not math.isfinite(number):
        raise ValueError
    return number


def _data_uri(name: str, path: Path) -> str:
    try:
        content = base64.b64encode(path.read_bytes()).decode()
    except OSError as error:
        raise UsageError(f"-i {name}=@{path}: {error.strerror}") from error
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return f"data:{kind};base64,{content}"


def _write(outputs: list[str], directory: Path) -> list[Path]:
    """Write data URIs as output.0.webp, output.1.webp, ..."""
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
