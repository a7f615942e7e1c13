"""The command line of script/bench, and script/bench gpu where there is no card."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import FrameType, SimpleNamespace

import pytest
import torch

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu.session import Session
from benchmarks.gpu.start import checkpoint, gpu_tests
from benchmarks.gpu.steps import Results, Step, do
from benchmarks.gpu.tiles import TILES
from miniature.checkpoint import Dimensions
from tests.support.server import wait_for
from weights.serving.inventory import MAPPED

BENCHMARKS = Path(__file__).parents[2] / "script" / "benchmarks"
IN_ANOTHER_TEST = "gpu_tests"  # they are skipped here, which takes ten seconds to say


@pytest.fixture
def bench(monkeypatch, capsys, tmp_path) -> Callable[..., tuple[int, str, list[dict]]]:
    def run(*arguments: str) -> tuple[int, str, list[dict]]:
        monkeypatch.setattr("sys.argv", ["gpu", "--out", str(tmp_path / "out"), *arguments])
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        status = gpu.main()
        return status, capsys.readouterr().out, Results(tmp_path / "out/results.jsonl").rows()

    return run


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("[!_]*.py")), ids=lambda path: path.stem)
def test_a_mistyped_option_is_refused_before_anything_is_measured(monkeypatch, capsys, path):
    module, called = import_module(f"benchmarks.{path.stem}"), []

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and Path(frame.f_code.co_filename).is_relative_to(BENCHMARKS):
            called.append(frame.f_code.co_name)

    monkeypatch.setattr("sys.argv", [path.stem, "--jsno", "x.json"])
    sys.setprofile(note)
    try:
        with pytest.raises(SystemExit):
            module.main()
    finally:
        sys.setprofile(None)
    assert "unrecognized arguments: --jsno" in capsys.readouterr().err
    assert set(called) <= {"main", "parser"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_card_it_says_so(bench) -> None:
    status, text, rows = bench()
    assert status == 0
    assert text.startswith("script/bench gpu: skipped: there is no CUDA device")
    assert rows == []


def test_a_step_that_is_not_there_is_refused(bench, capsys) -> None:
    with pytest.raises(SystemExit):
        bench("--only", "images,sculptures")
    assert "no such step: sculptures; there are machine, gpu_tests" in capsys.readouterr().err


def test_a_rehearsal_measures_everything(bench, monkeypatch) -> None:
    monkeypatch.setenv("FLUX_COMPILE", "off")  # tests/predictor/test_compile.py compiles
    steps = [step.name for step in gpu.STEPS if step.name != IN_ANOTHER_TEST]
    status, text, rows = bench("--rehearse", "--only", ",".join(steps))
    assert [row for row in rows if "error" in row or "skipped" in row] == []
    assert status == 0
    assert [row["step"] for row in rows if "took" in row] == steps
    figures = {name: v for row in rows for name, v in row.get("figures", {}).items()}
    for name in ("dev fp8, s", "dev bf16 with an adapter, s", "schnell fp8, 1 MP, s"):
        assert figures[name] > 0
    for name in ("diffusers compiled, s", "diffusers, hot-swap, ms", "decode, channels_last, ms"):
        assert figures[name] > 0
    assert figures["graphs in requests"] == 0
    assert figures["dev's base weights are in"] == MAPPED
    assert figures[f"dev fp8 swap, base weights in {MAPPED}, ms"] > 0
    assert figures["dev fp8, 1 MP: queued by the host in, ms"] > 0
    beside = {name: row["beside"] for row in rows if "beside" in row for name in row["figures"]}
    for precision in ("fp8", "bf16"):
        name = f"schnell {precision} comes in from {MAPPED}, s"
        assert beside[name] == ["dev bf16", "dev fp8"]
    (ratio,) = [row["figures"] for row in rows if "start / reading" in row.get("figures", {})]
    assert ratio["from the start of its process, s"] > ratio["reading its files, s"] > 0
    assert all(value for name, value in figures.items() if " bits" in name)
    assert figures["fp8 eager against bf16 eager, relative"] < 0.1
    assert "images     dev fp8, s: " in text
    (machine,) = [row for row in rows if "torch" in row]
    assert machine["torch"] == torch.__version__


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_in_order(bench, monkeypatch, number: signal.Signals) -> None:
    """With a table, and without a worker that goes on."""
    workers: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def start(*_: object, **__: object) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-c", "import time; time.sleep(60)"]
        workers.append(popen(command, start_new_session=True))
        threading.Timer(0.5, os.kill, (os.getpid(), number)).start()
        return workers[0]

    monkeypatch.setattr("benchmarks.gpu.__main__.subprocess.Popen", start)
    # Both are set: a command that a shell has started with `&` ignores SIGINT.
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: pytest.fail("nobody has handled it"))
    try:
        _, text, _ = bench("--rehearse", "--only", "machine")
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert "results.jsonl has all of it" in text
    assert workers[0].returncode == -signal.SIGKILL


@pytest.mark.parametrize("there", [True, False])
def test_official_checkpoints_are_used_where_they_are(bench, monkeypatch, there: bool) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr("benchmarks.gpu.__main__.is_there", lambda *_: there)
    monkeypatch.setattr("benchmarks.gpu.__main__.torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(
        "benchmarks.gpu.__main__.supervise", lambda _, start, *__: start(["setup"], {})
    )
    monkeypatch.setattr(
        "benchmarks.gpu.__main__.subprocess.Popen", lambda command, **_: commands.append(command)
    )
    bench("--only", "setup")
    (command,) = commands
    assert ("--checkpoint official" in " ".join(command)) == there


@pytest.mark.parametrize(
    ("in_memory", "on_disk", "takes", "blocks"),
    [
        (40, 40, "memory", 19),
        (30, 40, "disk", 19),
        (30, 30, "memory", 11),
        (10, 30, "disk", 11),
    ],
)
def test_a_synthetic_checkpoint_goes_where_there_is_room(
    monkeypatch, tmp_path, in_memory, on_disk, takes, blocks
) -> None:
    """In memory first, with fewer blocks in less room. It is made once, but again if unfinished."""
    made: list[tuple[Path, int]] = []
    free = room(monkeypatch, tmp_path, in_memory, on_disk)

    def build(directory: Path, dimensions: Dimensions, *_: object) -> None:
        directory.mkdir(parents=True)
        made.append((directory, dimensions.double_blocks))

    monkeypatch.setattr("benchmarks.gpu.start.synthetic.build", build)
    for _ in range(2):
        session = Session(tmp_path, Results(tmp_path / "results.jsonl"), None, rehearse=False)
        checkpoint(session)
        free[takes] -= 36 if blocks == 19 else 20
    ((directory, depth),) = made
    assert session.checkpoint == str(directory)
    assert (directory.parent, depth) == (tmp_path / takes, blocks)
    text = "\n".join(gpu.table(session.results.rows()))
    assert f"depth: {blocks} + {2 * blocks} blocks" in text
    notes = text.count("figures are of 11 + 22 blocks and 10 layers of T5; FLUX.1 has 19 + 38")
    assert notes == (blocks == 11)
    free[takes] = {"memory": in_memory, "disk": on_disk}[takes]
    (directory / "whole").unlink()
    (directory / "half a file").touch()
    session = Session(tmp_path, Results(tmp_path / "results.jsonl"), None, rehearse=False)
    checkpoint(session)
    assert made == [(directory, blocks)] * 2
    assert not list(directory.glob("half*"))


def test_without_room_for_a_synthetic_checkpoint_it_says_so(monkeypatch, tmp_path) -> None:
    room(monkeypatch, tmp_path, 10, 15)
    monkeypatch.setattr("benchmarks.gpu.start.synthetic.build", lambda *_: pytest.fail("built"))
    session = Session(tmp_path, Results(tmp_path / "results.jsonl"), None, rehearse=False)
    with pytest.raises(OSError, match=r"takes 36 GB .* or 20 GB .*/disk has 15 GB: make room"):
        checkpoint(session)


def room(monkeypatch, tmp_path: Path, in_memory: float, on_disk: float) -> dict[str, float]:
    """Two places for a synthetic checkpoint, with so many GB of room each."""
    free = {"memory": in_memory, "disk": on_disk}
    for name in free:
        (tmp_path / name).mkdir()
    monkeypatch.setattr("benchmarks.gpu.start.SHM", tmp_path / "memory")
    monkeypatch.setattr("benchmarks.gpu.start.tempfile.gettempdir", lambda: str(tmp_path / "disk"))
    monkeypatch.setattr(
        "benchmarks.gpu.start.shutil.disk_usage",
        lambda place: SimpleNamespace(free=1e9 * free[Path(place).name]),
    )
    return free


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN], ids=["", "&"])
def test_tests_that_run_out_of_time_say_why_some_failed(monkeypatch, tmp_path, handler) -> None:
    """Also where a shell has started all of it with `&`, which ignores SIGINT."""
    (tmp_path / "tests" / "flux").mkdir(parents=True)
    (tmp_path / "tests" / "flux" / "test_x.py").write_text(
        "import pytest, time\n"
        "@pytest.mark.gpu\ndef test_a(): raise OSError('the reason')\n"
        "@pytest.mark.gpu\ndef test_b(): open('under way', 'w').close(); time.sleep(60)\n"
    )
    (tmp_path / "tests" / "predictor").mkdir()
    (tmp_path / "tests" / "predictor" / "test_memory.py").touch()
    monkeypatch.setattr("benchmarks.gpu.start.ROOT", tmp_path)
    results = Results(tmp_path / "results.jsonl")
    session = Session(tmp_path, results, None, rehearse=False)

    def time_is_over() -> None:
        wait_for((tmp_path / "under way").exists)
        os.kill(os.getpid(), signal.SIGALRM)

    threading.Thread(target=time_is_over).start()
    before = signal.signal(signal.SIGINT, handler)
    try:
        do([Step("gpu_tests", 50, gpu_tests)], session, results, time.time() + 60)
    finally:
        signal.signal(signal.SIGINT, before)
    (figures,) = [row["figures"] for row in results.rows() if "figures" in row]
    assert "1 failed" in figures["pytest"]
    assert [line.split()[0] for line in figures["bad"]] == ["tests/flux/test_x.py::test_a"]
    assert "OSError: the reason" in (tmp_path / "gpu_tests.txt").read_text()


def test_the_first_tile_that_is_tried_is_the_one_in_use() -> None:
    pytest.importorskip("triton", reason="Triton has wheels for Linux only")
    from flux.transformers.lora_kernel import FLOAT8_TILE, TILE

    assert (TILES["bf16"][0], TILES["fp8"][0]) == (TILE, FLOAT8_TILE)
