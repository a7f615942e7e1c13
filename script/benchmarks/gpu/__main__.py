"""Everything that a CUDA card decides, in one command: script/bench gpu [--minutes 9].

With the official checkpoints, where script/download has put them or --checkpoint names them; else
with a synthetic one of FLUX.1's real dimensions, made on the card. The steps come in order of
importance, each with a time limit (steps.py). Results are lines of JSON in DIR/results.jsonl as
they come, and a table at the end; DIR/log.txt is the log.

To try the code without a card: script/bench gpu --rehearse
"""

import argparse
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import ours, plain, tiles
from benchmarks.gpu import start as begin
from benchmarks.gpu.session import Session
from benchmarks.gpu.steps import Results, Step, chosen, do, supervise
from flux.variants import VARIANTS
from weights.checkpoint import is_there
from weights.serving.settings import Settings

STEPS = (
    Step("machine", 45, begin.machine),
    Step("gpu_tests", 100, begin.gpu_tests),
    Step("checkpoint", 240, begin.checkpoint, base=True),
    Step("setup", 240, begin.setup, base=True, again={"FLUX_COMPILE": "off"}),
    Step("images", 120, ours.images),
    Step("kernels", 40, ours.kernels),
    Step("swaps", 90, ours.swaps),
    Step("ratios", 60, ours.ratios),
    Step("schnell", 60, ours.schnell),
    Step("memory", 30, ours.memory),
    Step("numbers", 40, ours.numbers),
    Step("plain", 120, plain.plain),
    Step("peft", 60, plain.peft),
    Step("tiles", 45, tiles.tiles),
    Step("restart", 180, begin.restart, anew=True),
    Step("eager", 40, ours.eager),
    Step("decoder", 30, ours.decoder),
    Step("backends", 75, ours.backends),
    Step("request", 40, ours.request),
)
REHEARSAL = {"FLUX_DEVICE": "cpu", "FLUX_DTYPE": "bfloat16", "FLUX_SAFETY_POLICY": "open_nsfw"}
PACE = 8.0  # of a rehearsal: factor on the limits


def main() -> int:
    """Run the command."""
    arguments = _arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = Results(arguments.out / "results.jsonl")
    pace = PACE if arguments.rehearse else 1.0
    if arguments.worker:
        torch.set_grad_enabled(False)
        logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
        session = Session(arguments.out, results, arguments.checkpoint, arguments.rehearse)
        steps = [step for step in STEPS if step.name in arguments.worker.split(",")]
        return do(steps, session, results, arguments.until, pace)
    if not torch.cuda.is_available() and not arguments.rehearse:
        print("script/bench gpu: skipped: there is no CUDA device here. --rehearse tries the code.")
        return 0
    until = time.time() + 60 * arguments.minutes
    before = len(results.rows())
    steps = chosen(STEPS, arguments.only)
    start = partial(_worker, arguments, until)
    ended = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C does
    with suppress(KeyboardInterrupt):  # what was measured is worth a table
        supervise(steps, start, results, until, pace)
    signal.signal(signal.SIGTERM, ended)
    rows = results.rows()[before:]
    print("\n".join(table(rows)))
    print(f"\n{arguments.out}/results.jsonl has all of it, {arguments.out}/log.txt the log")
    return 1 if any("error" in row for row in rows) else 0


def _arguments() -> argparse.Namespace:
    options = argparse.ArgumentParser(prog="script/bench gpu", description=__doc__)
    names = ", ".join(step.name for step in STEPS)
    options.add_argument("--minutes", type=float, default=9, help="for everything; default: 9")
    options.add_argument(
        "--only", type=lambda text: text.split(","), default=[], metavar="STEP,...", help=names
    )
    options.add_argument("--out", type=Path, default=Path(".cog/gpu"), help="default: .cog/gpu")
    options.add_argument("--checkpoint", default=_official(), help="official, or a directory")
    options.add_argument("--rehearse", action="store_true", help="tiny, and on the CPU")
    options.add_argument("--worker", help=argparse.SUPPRESS)
    options.add_argument("--until", type=float, help=argparse.SUPPRESS)
    found = options.parse_args()
    try:
        chosen(STEPS, found.only)
    except ValueError as error:
        options.error(str(error))
    if found.rehearse:
        found.checkpoint = None
    return found


def _official() -> str | None:
    """The official checkpoints, if both are there."""
    settings = Settings.from_environment()
    return "official" if all(is_there(v, "official", settings) for v in VARIANTS) else None


def _worker(
    arguments: argparse.Namespace, until: float, names: Sequence[str], extra: Mapping[str, str]
) -> "subprocess.Popen[bytes]":
    """Start a process for some steps; its output goes to the log."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu",
        "--worker",
        ",".join(names),
        "--until",
        str(until),
    ]
    command += ["--out", str(arguments.out)]
    command += ["--checkpoint", arguments.checkpoint] if arguments.checkpoint else []
    command += ["--rehearse"] if arguments.rehearse else []
    settings = REHEARSAL if arguments.rehearse else {}
    with (arguments.out / "log.txt").open("ab") as log:
        return subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            env={**os.environ, "PYTHONWARNINGS": "ignore", **settings, **extra},
            start_new_session=True,
        )


def table(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The figures, errors and times of the steps as lines of text, and what all must know."""
    lines, took, notes = [], [], []
    for row in rows:
        step = row["step"]
        lines += [f"{step:10} {name}: {value}" for name, value in row.get("figures", {}).items()]
        lines += [f"{step:10} {word}: {row[word]}" for word in ("error", "skipped") if word in row]
        took += [f"{step} {row['took']}"] if "took" in row else []
        notes += [f"note       {row['note']}"] if "note" in row else []
    return [*lines, f"seconds    {', '.join(took)}", *dict.fromkeys(notes)]


if __name__ == "__main__":
    sys.exit(main())
