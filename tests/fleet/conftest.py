"""A fleet of two replicas, one for all tests."""

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from serving.server import Server
from tests.fleet.running import (
    MARK,
    QUEUE,
    ROOT,
    Fleet,
    hang_up_until,
)


@pytest.fixture(scope="module")
def running(tmp_path_factory) -> Iterator[Fleet]:
    directory = tmp_path_factory.mktemp("fleet")
    settings = {
        "FLUX_CHECKPOINT": "nano",
        "FLUX_DEVICE": "cpu",
        "FLUX_OUTPUT_DIRECTORY": str(directory),
        # as many as the single server has: pictures are compared to the bit
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(os.cpu_count())),
        "LORA_ALLOW_LOCAL_PATHS": "true",
        "FLUX_CACHE_DIRECTORY": str(directory / "cache"),
        MARK: str(directory),
    }
    command = [ROOT / "script" / "fleet", "--replicas", "2", "--queue", str(QUEUE)]
    server, started = Server(settings, command=command), threading.Event()
    impatient = threading.Thread(target=hang_up_until, args=(started, server))
    impatient.start()
    try:
        with server:
            started.set()
            fleet = Fleet(server, directory)
            yield fleet
    finally:
        started.set()
        impatient.join()
    for helper in fleet.pids(b"ray::"):  # two of them outlive a kill -9 of the command by a minute
        os.kill(helper, signal.SIGKILL)


@pytest.fixture
def fleet(running) -> Fleet:
    running.wait_until_whole()
    return running


@pytest.fixture
def several() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2 + QUEUE) as pool:
        yield pool
