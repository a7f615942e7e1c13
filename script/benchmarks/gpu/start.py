"""The first steps of script/bench gpu: the machine, the tests marked gpu, weights, and setup."""

import gc
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import card, synthetic
from benchmarks.gpu.session import DEV, Session
from benchmarks.shared import full_depth
from flux.transformers.compile import graphs
from lora.formats.adapter import Targets, load_adapter
from miniature.checkpoint import FLUX1, Dimensions

ROOT = Path(__file__).resolve().parents[3]
SHM = Path("/dev/shm")
SYNTHETIC_BYTES = 36e9
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
            subprocess.run(command, stdout=sink, stderr=subprocess.STDOUT, cwd=ROOT, check=False)
    finally:  # also when its time is over
        lines = file.read_text().splitlines() or [""]
        bad = [line for line in lines if re.search(r"^tests/.* (FAILED|ERROR)|^ERROR tests", line)]
        session.record("gpu_tests", {"pytest": lines[-1].strip("= "), "bad": bad})


def checkpoint(session: Session) -> None:
    """A synthetic checkpoint, in memory-backed storage where there is room."""
    if session.checkpoint:
        return
    directory = session.out / "checkpoint" if session.rehearse else _place()
    if not (whole := directory / "whole").exists():
        start = time.perf_counter()
        dimensions = TINY if session.rehearse else FLUX1
        synthetic.build(directory, dimensions, session.device.type)
        whole.touch()
        seconds = round(time.perf_counter() - start, 1)
        session.record("checkpoint", {"made in, s": seconds, "it stays in": str(directory)})
    if session.device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
    session.checkpoint = str(directory)


def _place() -> Path:
    """Where a synthetic checkpoint goes, and stays for the next call."""
    in_memory = SHM.is_dir() and shutil.disk_usage(SHM).free > SYNTHETIC_BYTES
    return (SHM if in_memory else Path(tempfile.gettempdir())) / "flux-synthetic"


def setup(session: Session) -> None:
    """Set up the predictor, and two adapters for all linears of the transformer."""
    if session.checkpoint:
        os.environ["FLUX_CHECKPOINT"] = session.checkpoint
    start = time.perf_counter()
    session.predictor.setup()
    seconds = time.perf_counter() - start
    session.graphs = graphs()
    figures: dict[str, Any] = {"READY after, s": round(seconds, 1), "graphs": session.graphs}
    if session.device.type == "cuda":
        figures["on the device, GB"] = round(torch.cuda.memory_allocated() / 1e9, 2)
    transformers = session.engine._transformers
    session.record("setup", figures, resident=[" ".join(key) for key in transformers.resident])
    targets, directory = Targets(session.engine.shapes), Path(tempfile.mkdtemp())
    for seed in (1, 2):
        file = directory / f"{seed}.safetensors"
        full_depth.write_adapter(file, transformers.modules[DEV], seed)
        session.files.append(file)
        session.adapters.append([(load_adapter(file, file.stem, targets), 1.0)])
