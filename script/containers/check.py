"""The command behind script/container-check: a line for each way of running the image."""

import argparse
import base64
import json
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import requests

from containers.image import IMAGE, ROOT, build

URL = "http://127.0.0.1:5000"
NAME, VOLUME = "flux-check", "flux-check"
QUICK = {"prompt": "a star", "megapixels": "0.25", "num_inference_steps": 2, "seed": 1}
LONG = {"prompt": "a star", "num_inference_steps": 50, "num_outputs": 2}
SERVED = {".cog", "LICENSE", "cog.yaml", "flux", "lora", "predict.py", "safety", "weights"}
HEALTH = "python -c \"import urllib.request as u, sys; sys.exit(not any(s in u.urlopen('http://127.0.0.1:5000/health-check').read() for s in (b'READY', b'BUSY', b'STARTING')))\""  # noqa: E501  (one line, as docs/deploy.md has it)


class CheckError(Exception):
    """Something is not as it should be."""


FAILURES = (
    CheckError,
    AssertionError,
    subprocess.CalledProcessError,
    requests.RequestException,
)


def main() -> int:
    """Build, run every check, and return 1 if one has failed."""
    options = argparse.ArgumentParser(prog="script/container-check", description=__doc__)
    options.add_argument("--base", default="python:3.11-slim", help="an image with Python 3.11")
    options.add_argument("--built", action="store_true", help=f"use {IMAGE} as it is")
    arguments = options.parse_args()
    if not arguments.built:
        build(arguments.base)
    failed = 0
    for check in CHECKS:
        start = time.monotonic()
        try:
            found = check()
        except FAILURES as error:
            failed += 1
            found = f"FAILED: {error}"
        finally:
            docker("rm", "--force", NAME, check=False)
        print(f"{check.__doc__}: {found} ({time.monotonic() - start:.1f} s)", flush=True)
    docker("volume", "rm", "--force", VOLUME, check=False)
    print(f"{len(CHECKS) - failed} of {len(CHECKS)} checks passed")
    return 1 if failed else 0


def docker(*arguments: str, check: bool = True) -> str:
    """Run a docker command and return what it prints."""
    command = ["docker", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if check and result.returncode:
        raise CheckError(f"docker {arguments[0]}: {result.stderr.strip()[-300:]}")
    return result.stdout.strip()


def start(*options: str) -> None:
    """Start a container, and wait until it is ready."""
    network = ("--network", "host", "--env", "FLUX_CHECKPOINT=nano")
    docker("run", "--detach", "--name", NAME, *network, *options, IMAGE)
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        status, logs = health()
        if status == "READY":
            return
        if status == "SETUP_FAILED":
            raise CheckError(f"setup failed: {logs[-300:]}")
        time.sleep(0.1)
    raise CheckError(f"not ready after 180 s: {health()}")


def health() -> tuple[str, str]:
    """The server's status, and the log of its setup."""
    try:
        answer = requests.get(f"{URL}/health-check", timeout=15).json()
        return answer["status"], (answer.get("setup") or {}).get("logs", "")
    except requests.RequestException:
        return "none", ""


def predict(**inputs: Any) -> dict[str, Any]:
    """The answer to a prediction with QUICK's inputs, save where others are given."""
    for _ in range(40):
        answer = requests.post(f"{URL}/predictions", json={"input": QUICK | inputs}, timeout=300)
        if answer.status_code != 409:  # between two predictions
            break
        time.sleep(0.25)
    return answer.json() | {"code": answer.status_code}


def adapter() -> str:
    """An adapter as a data URI."""
    content = (ROOT / "weights" / "nano" / "adapters" / "outline.safetensors").read_bytes()
    return f"data:application/octet-stream;base64,{base64.b64encode(content).decode()}"


def serves(*options: str) -> str:
    """Start with some options, and predict, with and without an adapter's cache."""
    start(*options)
    answer = predict()
    assert answer["status"] == "succeeded", answer
    assert predict(num_outputs=9)["code"] == 422
    adapted = predict(replicate_weights=adapter())
    return f"READY, predicts; with an adapter: {adapted['status']} {adapted.get('error') or ''}"


def plain() -> str:
    """As root"""
    found = serves()
    assert "succeeded" in found, found
    return found


def another_user() -> str:
    """--user 1000:1000, without a home"""
    found = serves("--user", "1000:1000")
    assert "FLUX_CACHE_DIRECTORY" in found, found
    return found


def another_user_with_cache() -> str:
    """--user 1000:1000 with FLUX_CACHE_DIRECTORY=/tmp/cache"""
    found = serves("--user", "1000:1000", "--env", "FLUX_CACHE_DIRECTORY=/tmp/cache")
    assert "succeeded" in found, found
    return found


def read_only() -> str:
    """--read-only --tmpfs /tmp:exec"""
    found = serves("--read-only", "--tmpfs", "/tmp:exec")
    assert "FLUX_CACHE_DIRECTORY" in found, found
    return found


def confined() -> str:
    """--user, --read-only, --cap-drop ALL, no-new-privileges, --memory 4g"""
    rights = ("--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--memory", "4g")
    cache = ("--tmpfs", "/tmp", "--env", "HOME=/tmp")
    found = serves("--user", "1000:1000", "--read-only", *rights, *cache)
    assert "succeeded" in found, found
    return found


def full_output() -> str:
    """An output directory that is full"""
    start("--tmpfs", "/out:size=64k", "--env", "FLUX_OUTPUT_DIRECTORY=/out")
    error = predict(output_format="png")["error"]
    assert "The disk of the output directory /out is full" in error, error
    assert predict(output_quality=1)["status"] == "succeeded"  # nothing half-written is left
    return error


def killed_worker() -> str:
    """kill -9 of the worker, with the HEALTHCHECK of docs/deploy.md"""
    start("--health-cmd", HEALTH, "--health-interval", "1s", "--health-retries", "2")
    wait_for(lambda: inspect("{{.State.Health.Status}}") == "healthy")
    code = "import os,signal; [os.kill(int(p), 9) for p in os.listdir('/proc') if p.isdigit() and b'_run_worker' in open(f'/proc/{p}/cmdline','rb').read() and int(p) != os.getpid()]"  # noqa: E501
    docker("exec", NAME, "python", "-c", code, check=False)
    wait_for(lambda: inspect("{{.State.Health.Status}}") == "unhealthy")
    return f"docker says unhealthy, /health-check says {health()[0]}"


def stopped_idle() -> str:
    """docker stop without a request"""
    start()
    docker("stop", NAME)
    assert inspect("{{.State.ExitCode}}") == "0", inspect("{{.State.ExitCode}}")
    return "exit code 0"


def stopped_busy() -> str:
    """docker stop --time=120 during a synchronous prediction"""
    start()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(lambda: predict(**LONG))
        wait_for(lambda: health()[0] == "BUSY")
        docker("stop", "--time=120", NAME)
        status = answer.result()["status"]
    assert (status, inspect("{{.State.ExitCode}}")) == ("succeeded", "0"), status
    return "the caller has the answer, exit code 0"


def kept_cache() -> str:
    """A new container with the volume of the one before finds the adapter on disk"""
    volume = ("--volume", f"{VOLUME}:/cache", "--env", "FLUX_CACHE_DIRECTORY=/cache")
    logs = []
    for _ in range(2):
        start(*volume)
        logs.append(predict(replicate_weights=adapter())["logs"])
        docker("rm", "--force", NAME)
    assert "from download" in logs[0], logs[0]
    assert "from disk" in logs[1], logs[1]
    return "from download, then from disk"


def commands() -> str:
    """python -m weights and python -m flux.quantize call themselves that"""
    for module in ("weights", "flux.quantize"):
        usage = docker("run", "--rm", IMAGE, "python", "-m", module, "--help")
        assert usage.startswith(f"usage: python -m {module} "), usage[:80]
    return "yes"


def contents() -> str:
    """/src holds what the server reads, and nothing else"""
    found = set(docker("run", "--rm", IMAGE, "ls", "-A", "/src").split())
    assert found == SERVED, found ^ SERVED
    return " ".join(sorted(found))


def versions() -> str:
    """The newest cog below 1.0 serves"""
    start()
    versions = requests.get(f"{URL}/health-check", timeout=15).json()["version"]
    assert predict()["status"] == "succeeded"
    return json.dumps({name: versions[name] for name in ("coglet", "python_sdk", "python")})


def inspect(form: str) -> str:
    """A field of the container's state."""
    return docker("inspect", "--format", form, NAME)


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise CheckError(f"waited for {seconds:g} s in vain")
        time.sleep(0.2)


CHECKS = (
    *(plain, another_user, another_user_with_cache, read_only, confined, full_output),
    *(killed_worker, stopped_idle, stopped_busy, kept_cache, commands, contents, versions),
)


if __name__ == "__main__":
    sys.exit(main())
