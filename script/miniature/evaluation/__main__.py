"""Measure the embedded miniature through the running predictor: script/miniature/evaluate.

Every part's rows go into a JSON file as soon as the part is done, and the tables of all parts
into weights/README.md between two marker comments. An interrupted run goes on at the picture
where it was: pictures are kept. What was measured on other weights is dropped.
"""

import argparse
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miniature.evaluation import adherence, effects
from miniature.evaluation.gallery import write_gallery
from miniature.evaluation.goals import goals
from miniature.evaluation.painter import ADAPTERS, Painter, digest
from serving.server import ServerError

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[3]
START = "<!-- evaluation: written by script/miniature/evaluate -->"
END = "<!-- end of the evaluation -->"

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Part:
    """One table: `run` takes the painter and the number of captions."""

    title: str
    note: str
    run: Callable[[Painter, int], Rows]


PARTS = {
    "prompts": Part(
        "One object",
        "Captions of held-out combinations with fixed seeds, percent right.",
        adherence.prompts,
    ),
    "pairs": Part(
        "Two objects",
        "A colour is there if it covers a flat area; each half of the picture is then measured "
        "as a picture of one object.",
        adherence.pairs,
    ),
    "measure": Part(
        "The measure itself",
        "On renders of the same scenes, and on dev's pictures beside captions that are not theirs.",
        adherence.measure_itself,
    ),
    "guidance": Part(
        "Guidance, dev",
        "Contrast: the slope of the pixels, about mid grey, on those of the scene at guidance 3.",
        effects.guidance,
    ),
    "strength": Part(
        "Image to image, dev",
        "From the render of one scene with the caption of another.",
        effects.strength,
    ),
    "inpainting": Part(
        "Inpainting, dev",
        "A pair's caption, a picture of its first object, and a mask about where the second is.",
        effects.inpainting,
    ),
    "adapters": Part(
        "Adapters, dev",
        "Contrast: 1 is the scene and -1 its negative. Hollow: the share of the object's middle "
        "where the background shows. With `go_fast` the predictor takes scales times 1.5.",
        effects.adapters,
    ),
    "go_fast": Part(
        "go_fast",
        "The same requests in bf16 and with float8 weights: what both show, and the PSNR between.",
        effects.go_fast,
    ),
}


def main() -> int:
    """Run the command; the exit status says whether it ended, not what it measured."""
    arguments = _arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for ending in (signal.SIGTERM, signal.SIGHUP):  # as exceptions, they stop the servers too
        signal.signal(ending, lambda number, _: sys.exit(128 + number))
    try:
        with Painter(arguments.pictures, arguments.workers) as painter:
            if arguments.gallery:
                write_gallery(painter, arguments.gallery)
            else:
                evaluate(painter, arguments)
    except (ServerError, ValueError, OSError) as error:
        logger.error("%s", error)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def evaluate(painter: Painter, arguments: argparse.Namespace) -> None:
    """Run parts, and write the report after each."""
    report = _earlier(arguments.json, painter.checkpoint, digest(ADAPTERS))
    for name in arguments.part or PARTS:
        logger.info("%s", name)
        rows = PARTS[name].run(painter, arguments.captions)
        report["parts"][name] = {"captions": arguments.captions, "rows": list(rows)}
        if not rows:
            del report["parts"][name]
        _write(arguments.json, json.dumps(report, indent=1) + "\n")
    text = markdown(report)
    print(text)
    if arguments.table:
        _write(arguments.table, replaced(arguments.table, text))


def markdown(report: Mapping[str, Any]) -> str:
    """The goals and all tables, with the digest of the weights that they were measured on."""
    parts = {name: report["parts"][name]["rows"] for name in PARTS if name in report["parts"]}
    sections = [f"Measured on the weights with the digest `{report['checkpoint']}`, on a CPU."]
    sections.append(_table(goals(parts)))
    for name, rows in parts.items():
        sections += [f"### {PARTS[name].title}", PARTS[name].note, _table(rows)]
    return "\n\n".join(section for section in sections if section)


def replaced(file: Path, text: str) -> str:
    """The file's text with what is between the markers replaced.

    Raises:
        ValueError: if the markers are not there, once each and in order.
    """
    before, start, rest = file.read_text().partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise ValueError(f"{file} has no place for the table: expected {START} and then {END}")
    return f"{before}{START}\n\n{text}\n\n{END}{after}"


def _table(rows: Rows) -> str:
    if not rows:
        return ""
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    lines += [["" if value is None else f"{value}" for value in row.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _earlier(file: Path, checkpoint: str, adapters: str) -> dict[str, Any]:
    """The report so far, what is in it about other weights or other adapters left out."""
    report: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    parts = report.get("parts", {})
    if report and report["checkpoint"] != checkpoint:
        logger.info("%s is about other weights (%s): dropped", file, report["checkpoint"])
        parts = {}
    elif "adapters" in parts and report.get("adapters") != adapters:
        logger.info("%s is about other adapters: their part is dropped", file)
        del parts["adapters"]
    new = {"checkpoint": checkpoint, "adapters": adapters, "cores": os.cpu_count()}
    return new | {"parts": parts}


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(text)
    partial.replace(file)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="script/miniature/evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    count = _positive
    parser.add_argument("--captions", type=count, default=200, metavar="N", help="default: 200")
    parser.add_argument("--part", action="append", choices=PARTS, help="this part; may be repeated")
    parser.add_argument("--workers", type=count, default=1, metavar="N", help="servers; default: 1")
    parser.add_argument("--json", type=Path, default=ROOT / "docs/miniature.json", metavar="FILE")
    parser.add_argument(
        "--table",
        type=_file_or_none,
        default=ROOT / "weights/README.md",
        metavar="FILE",
        help="where the markers are; an empty name writes no table",
    )
    parser.add_argument("--pictures", type=Path, default=ROOT / ".evaluation", metavar="DIR")
    parser.add_argument(
        "--gallery", type=Path, metavar="FILE", help="draw the contact sheet, and measure nothing"
    )
    return parser.parse_args()


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected 1 or more")
    return number


def _file_or_none(text: str) -> Path | None:
    return Path(text) if text else None


if __name__ == "__main__":
    sys.exit(main())
