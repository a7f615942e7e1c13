"""The newcomer's commands, run as a newcomer runs them."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from serving import client
from serving.server import SERVE, Server, ServerError, free_port, processes
from tests.support.pictures import colours
from tests.support.server import SERVER, WORKER, wait_for

ROOT = Path(__file__).parents[2]
PREDICT = ROOT / "script" / "predict"
MARK = "STARTED_BY_TEST_IN"  # tells this test's servers from those of tests that run beside it


def environment_of(cwd: Path, **environment: str) -> dict[str, str]:
    return {**os.environ, "FLUX_CHECKPOINT": "nano", MARK: str(cwd), **environment}


def run(*arguments: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """script/predict in a directory of its own, on the miniature."""
    return subprocess.run(
        [PREDICT, *arguments],
        cwd=cwd,
        env=environment_of(cwd, **environment),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@contextmanager
def started(
    command: str | Path, *arguments: str | Path, cwd: Path, **options: Any
) -> Iterator[subprocess.Popen]:
    """A command that runs in the background; when the test fails, it is killed with its servers."""
    process = subprocess.Popen(
        [command, *arguments],
        cwd=cwd,
        env=environment_of(cwd),
        text=True,
        **options,
    )
    try:
        yield process
    finally:
        process.kill()
        for server in servers(cwd):
            os.kill(server, signal.SIGKILL)
        process.communicate()


@pytest.mark.parametrize("when", ["Running setup", "Using seed"])
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_predict_leaves_no_server(tmp_path, when: str, ending: int) -> None:
    inputs = ["prompt=x", "num_inference_steps=50", "num_outputs=4"]
    with started(
        PREDICT,
        *(o for i in inputs for o in ("-i", i)),
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # as in a terminal
    ) as process:
        if when == "Using seed":
            assert any(when in line for line in process.stderr)
        else:
            wait_for(lambda: servers(tmp_path))
        process.send_signal(ending)
        _, log = process.communicate(timeout=60)
        assert process.returncode == 128 + ending
        assert "Traceback" not in log
        assert servers(tmp_path) == []


def test_a_server_may_start_for_as_long_as_it_says_something(tmp_path, monkeypatch) -> None:
    stand_in = tmp_path / "serve"
    stand_in.write_text(
        "#!/bin/sh\nfor i in 1 2 3 4 5; do echo line $i; sleep 0.2; done; sleep 60\n"
    )
    stand_in.chmod(0o755)
    monkeypatch.setattr("serving.server.SERVE", stand_in)
    monkeypatch.setattr("serving.server.SILENT_SECONDS", 0.6)
    with (
        pytest.raises(ServerError, match=r"silent for 0.6 s:\n(.*\n)*line 5"),
        Server(patience=0.1),
    ):
        pass


def test_serve_ends_with_an_error_when_its_worker_is_lost_in_setup(tmp_path) -> None:
    """Later: tests/http/test_official.py, whose server is at its end."""
    port = str(free_port())
    with started(SERVE, "--port", port, cwd=tmp_path, stderr=subprocess.PIPE) as process:
        assert any("Running setup" in line for line in process.stderr)
        (worker,) = servers(tmp_path, WORKER)
        os.kill(worker, signal.SIGKILL)
        _, log = process.communicate(timeout=60)
        assert process.returncode == 1
        assert "script/serve: SETUP_FAILED: no prediction can succeed" in log
        assert servers(tmp_path) == []


def test_serve_that_is_stopped_in_setup_leaves_no_worker(tmp_path) -> None:
    """What a shell has started before it becomes the server stays."""
    shell = tmp_path / "shell"
    shell.write_text(f"sleep 60 2>&- &\necho $! >beside\nexec {SERVE} --port $1\n")
    command = ["bash", shell, str(free_port())]
    with started(*command, cwd=tmp_path, stderr=subprocess.PIPE) as process:
        assert any("Running setup" in line for line in process.stderr)
        assert len(servers(tmp_path, WORKER)) == 1
        process.terminate()
        process.wait(timeout=60)  # no more: the log ends with the worker
        assert servers(tmp_path) == []
        os.kill(int((tmp_path / "beside").read_text()), signal.SIGKILL)


def servers(cwd: Path, *programs: bytes) -> list[int]:
    """The process ids of Cog servers and workers that `environment_of(cwd)` was given to."""
    mark = f"{MARK}={cwd}"
    return [pid for name in programs or (SERVER, WORKER) for pid in processes(name, mark)]


def test_predict_writes_pictures_and_prints_paths_and_metrics(tmp_path) -> None:
    colours(96, 64).save(tmp_path / "photo.png")
    inputs = ["prompt=a heart", "image=@photo.png", "num_inference_steps=3", "num_outputs=2"]
    inputs += ["seed=9007199254740993"]  # 2**53 + 1, which no float is
    options = [o for i in [*inputs, "output_format=jpg", "prompt_strength=0.5"] for o in ("-i", i)]
    result = run(
        *options, "-o", "drawn", cwd=tmp_path, FLUX_OUTPUT_DIRECTORY=str(tmp_path / "kept")
    )
    assert result.returncode == 0, result.stderr
    assert "Using seed: 9007199254740993\n" in result.stderr
    assert "torchao" not in result.stderr  # what the libraries miss is no user's business
    assert "torchvision" not in result.stderr
    assert "2/2 [" in result.stderr  # progress: half of three steps, rounded to even
    first, second, metrics = result.stdout.split("\n", 2)
    for number, path in enumerate((first, second)):
        assert path == f"drawn/output.{number}.jpg"
        with Image.open(tmp_path / path) as image:
            assert (image.format, image.size) == ("JPEG", (96, 64))
    assert json.loads(metrics)["image_output_count"] == 2
    assert servers(tmp_path) == []
    assert list((tmp_path / "kept").iterdir()) == []  # the server had the time to clean up


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["-i", "prompt"], {}, "-i prompt: expected NAME=VALUE or NAME=@FILE"),
        (["-i", "promt=a heart"], {}, "-i promt=a heart: no such input; there are aspect_ratio"),
        (["-i", "image=@absent.png"], {}, "-i image=@absent.png: No such file"),
        (["-i", "image=a.png"], {}, "expected a URL; a file is sent as image=@a.png"),
        (["-i", "num_outputs=two"], {}, "-i num_outputs='two': expected integer"),
        (["-i", "num_outputs=1.5"], {}, "-i num_outputs='1.5': expected integer"),
        (["-i", "guidance_scale=nan"], {}, "-i guidance_scale='nan': expected number"),
        (["-i", "go_fast=maybe"], {}, "-i go_fast='maybe': expected boolean"),
        (["-i", "seed=1", "-i", "seed=2"], {}, "-i seed=2: seed is given twice"),
        (["-i", "prompt=x", "-o", "/proc/drawn"], {}, "/proc/drawn"),
        (["-i", "prompt=x"], {"FLUX_CHECKPOINT": "/absent"}, "/absent/dev holds no pipeline"),
    ],
)
def test_predict_fails_with_the_reason_and_leaves_no_server(
    tmp_path, arguments, environment, message: str
) -> None:
    result = run(*arguments, cwd=tmp_path, **environment)
    assert result.returncode == 1
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []
    assert servers(tmp_path) == []


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("width=5000", "HTTP 422: width: "),
        ("aspect_ratio=custom", "custom needs both width and height"),
    ],
)
def test_predict_says_what_the_server_refuses(
    server, monkeypatch, capsys, tmp_path, option: str, message: str
) -> None:
    @contextmanager
    def running(**_: object) -> Iterator[Server]:
        yield server.server

    monkeypatch.setattr("serving.client.Server", running)
    monkeypatch.setattr(
        "serving.client.signal.signal", lambda *_: None
    )  # this process keeps its own
    monkeypatch.setattr(
        "sys.argv", ["predict", "-i", "prompt=x", "-i", option, "-o", str(tmp_path)]
    )
    assert client.main() == 1
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_page_on_memory_has_its_tables() -> None:
    """What fits where, from FLUX.1's own dimensions and the code that decides it."""
    from benchmarks import memory

    sizes, shared = memory.transformers(), memory.components()
    page = (ROOT / "docs/memory.md").read_text()
    for table in (memory.cards(sizes, shared), memory.hosts(sizes, shared)):
        assert "\n".join(table) in page
    assert all(f"{size / 1e9:.2f}" in page for size in sizes.values())
