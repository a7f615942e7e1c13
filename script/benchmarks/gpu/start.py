"""The first steps of script/bench gpu: the machine, the tests marked gpu, weights, and setup."""

import gc
import mmap
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import torch

from benchmarks.gpu import card, synthetic
from benchmarks.gpu.session import DEV, Session
from benchmarks.shared import full_depth
from flux.deployment import sources_of
from flux.transformers.compile import graphs
from lora.formats.adapter import Targets, load_adapter
from miniature.checkpoint import FLUX1, Dimensions
from weights.serving.settings import Settings

ROOT = Path(__file__).resolve().parents[3]
SHM = Path("/dev/shm")
SHALLOW = replace(FLUX1, double_blocks=11, single_blocks=22, t5_layers=10)
SYNTHETIC = {"flux-synthetic": (FLUX1, 36), "flux-synthetic-shallow": (SHALLOW, 20)}
"""Directories of synthetic checkpoints, the most wanted first; the GB of room that each takes."""
WHOLE = "whole"  # a file that says so
TO_SAY_WHY = 10  # seconds
BUFFER = 1 << 25  # of whole pages: into others some processors copy at a third of the speed
TINY = Dimensions(  # for a rehearsal
    double_blocks=1,
    single_blocks=1,
    heads=2,
    t5_layers=1,
    clip_layers=1,
    vae_channels=(8, 8, 8, 8),
)


def machine(session: Session) -> None:
    """The machine, and what it can do by itself."""
    session.record("machine", {}, **card.describe())
    for measure in (card.bandwidths, card.products, card.attention):
        session.record("machine", measure(session.device))


def gpu_tests(session: Session) -> None:
    """The tests marked gpu, in a process of their own."""
    file = session.out / "gpu_tests.txt"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests/flux",
        "tests/predictor/test_memory.py",
        "-m",
        "gpu",
    ]
    command += ["-o", "addopts=", "-p", "no:cacheprovider", "-v", "--tb=short", "-W", "default"]
    try:
        with file.open("w") as sink:
            _run(command, sink)
    finally:  # also when its time is over
        lines = file.read_text().splitlines() or [""]
        bad = [line for line in lines if re.search(r"^tests/.* (FAILED|ERROR)|^ERROR tests", line)]
        session.record("gpu_tests", {"pytest": lines[-1].strip("= "), "bad": bad})


def _run(command: Sequence[str], sink: IO[str]) -> None:
    """Run pytest to its end; when its time is over, it still says why tests have failed."""
    # A command that a shell has started with `&` ignores SIGINT, and so would its children.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, cwd=ROOT) as tests:
            try:
                tests.wait()
            except BaseException:
                tests.send_signal(signal.SIGINT)
                with suppress(subprocess.TimeoutExpired):
                    tests.wait(TO_SAY_WHY)
                tests.kill()
                raise
    finally:
        signal.signal(signal.SIGINT, before)


def checkpoint(session: Session) -> None:
    """A synthetic checkpoint, in memory-backed storage where there is room; shallow in little."""
    if session.checkpoint:
        return
    directory, dimensions = (
        (session.out / "checkpoint", TINY) if session.rehearse else _place_and_dimensions()
    )
    if not (whole := directory / WHOLE).exists():
        start = time.perf_counter()
        synthetic.build(directory, dimensions, session.device.type)
        whole.touch()
        seconds = round(time.perf_counter() - start, 1)
        session.record("checkpoint", {"made in, s": seconds, "it stays in": str(directory)})
    session.record("checkpoint", {"depth": _depth(dimensions)})
    if dimensions != FLUX1:
        note = f"from setup on, figures are of {_depth(dimensions)}; FLUX.1 has {_depth(FLUX1)}"
        session.results.add("checkpoint", note=note)
    if session.device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
    session.checkpoint = str(directory)


def _place_and_dimensions() -> tuple[Path, Dimensions]:
    """Where a synthetic checkpoint is, or goes; it stays there for the next worker and call.

    Raises:
        OSError: there is no room for any.
    """
    places = [place for place in (SHM, Path(tempfile.gettempdir())) if place.is_dir()]
    for directory in (place / name for place in places for name in SYNTHETIC):
        if not (directory / WHOLE).exists():  # what an earlier worker did not finish
            shutil.rmtree(directory, ignore_errors=True)
    free = {place: shutil.disk_usage(place).free / 1e9 for place in places}
    for name, (dimensions, room) in SYNTHETIC.items():
        there = [place for place in places if (place / name / WHOLE).exists()]
        if found := there + [place for place in places if free[place] > room]:
            return found[0] / name, dimensions
    takes = " or ".join(f"{room} GB ({_depth(dims)})" for dims, room in SYNTHETIC.values())
    has = ", ".join(f"{place} has {gb:.0f} GB" for place, gb in free.items())
    raise OSError(
        f"a synthetic checkpoint takes {takes}; {has}: make room there, or name another "
        "directory in TMPDIR"
    )


def _depth(dimensions: Dimensions) -> str:
    return (
        f"{dimensions.double_blocks} + {dimensions.single_blocks} blocks and "
        f"{dimensions.t5_layers} layers of T5"
    )


def setup(session: Session) -> None:
    """Set up the predictor, and two adapters for all linears of the transformer."""
    _set_up(session, "setup")
    _make_adapters(session)


def restart(session: Session) -> None:
    """Set up as the next start does: in a new process, with what the last one has left.

    Compiled kernels are kept, and files of weights are in the page cache. What reading those files
    alone takes is measured beside it.
    """
    checkpoint(session)
    _set_up(session, "restart")
    ready = _age_of_this_process()
    start = time.perf_counter()
    size = sum(_read(file) for file in _weights(Settings.from_environment()))
    reading = time.perf_counter() - start
    session.record(
        "restart",
        {
            "from the start of its process, s": round(ready, 1),
            "reading its files, s": round(reading, 2),
            "start / reading": round(ready / reading, 2),
        },
        read_gb=round(size / 1e9, 2),
    )
    _make_adapters(session)


def _set_up(session: Session, step: str) -> None:
    if session.checkpoint:
        os.environ["FLUX_CHECKPOINT"] = session.checkpoint
    start = time.perf_counter()
    session.predictor.setup()
    seconds = time.perf_counter() - start
    session.graphs = graphs()
    figures: dict[str, Any] = {"READY after, s": round(seconds, 1), "graphs": session.graphs}
    if session.device.type == "cuda":
        figures["on the device, GB"] = round(torch.cuda.memory_allocated() / 1e9, 2)
    resident = session.engine._transformers.resident
    session.record(step, figures, resident=[" ".join(key) for key in resident])


def _make_adapters(session: Session) -> None:
    targets, directory = Targets(session.engine.shapes), Path(tempfile.mkdtemp())
    for seed in (1, 2):
        file = directory / f"{seed}.safetensors"
        full_depth.write_adapter(file, session.engine._transformers.modules[DEV], seed)
        session.files.append(file)
        session.adapters.append([(load_adapter(file, file.stem, targets), 1.0)])


def _age_of_this_process() -> float:
    """Seconds since it began (proc_pid_stat(5): field 22, in ticks since the system's start)."""
    after_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    began = int(after_name[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - began


def _weights(settings: Settings) -> list[Path]:
    """The files of weights of both checkpoints; those of a synthetic one are dev's, read twice."""
    sources = sources_of(settings.checkpoint, settings).values()
    return [file for source in sources for file in source.rglob("*.safetensors")]


def _read(file: Path) -> int:
    """Read a file to its end; return its size in bytes."""
    size = 0
    with file.open("rb", buffering=0) as opened, mmap.mmap(-1, BUFFER) as aligned:
        while count := opened.readinto(aligned):
            size += count
    return size
