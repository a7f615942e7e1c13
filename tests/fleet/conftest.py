"""A fleet of two replicas, one for all tests."""

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from serving.server import Server
from tests.fleet.running import MARK, QUEUE, ROOT, Fleet, hang_up_until
from tests.support.inputs import SMALL
from tests.support.server import THREADS, LoggedServer


@pytest.fixture(scope="module")
def server(server: LoggedServer) -> LoggedServer:
    """The single server that is compared with, as after a start: without an adapter."""
    server.generate(**SMALL)
    return server


@pytest.fixture(scope="module")
def running(tmp_path_factory) -> Iterator[Fleet]:
    """The fleet as it is; a replica may have been lost and its successor still be starting."""
    directory = tmp_path_factory.mktemp("fleet")
    settings = {
        "FLUX_CHECKPOINT": "nano",
        "FLUX_DEVICE": "cpu",
        "FLUX_OUTPUT_DIRECTORY": str(directory),
        **THREADS,
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
    """The fleet with all its replicas."""
    running.wait_until_whole()
    return running


@pytest.fixture
def several() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2 + QUEUE) as pool:
        yield pool
