"""script/fleet as a command, the config file for a cluster, and a replica by itself."""

import os
import subprocess

import pytest

from tests.fleet.running import ROOT


def test_a_wrong_number_is_refused() -> None:
    command = [ROOT / "script" / "fleet", "--replicas", "0"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "--replicas: 0: expected 1 or more" in result.stderr


def test_the_config_file_is_one_that_serve_takes() -> None:
    program = """
import yaml
from ray.serve.schema import ServeDeploySchema
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as serve_calls
from replicas.app import build
config = ServeDeploySchema.model_validate(yaml.safe_load(open("script/replicas/serve.yaml")))
(application,) = config.applications
assert application.import_path == "replicas.app:build"
serve_calls(build, application.args)
"""
    run(program)


ASYNCHRONOUS = "{'prefer': 'respond-async'}"
CANCEL = """
    sent = asyncio.create_task(follow(stream))
    while not await busy(replica):
        await asyncio.sleep(0.01)
    sent.cancel()
    await asyncio.wait({sent}, timeout=20)
"""
CLOSE = """
    await anext(stream)  # the answer
    await stream.aclose()
"""


@pytest.mark.parametrize(
    ("headers", "end"),
    [("{}", CANCEL), (ASYNCHRONOUS, CANCEL), (ASYNCHRONOUS, CLOSE)],
    ids=["synchronous", "asynchronous", "closed"],
)
def test_a_replica_repeats_a_cancel_until_its_server_is_free(headers: str, end: str) -> None:
    program = f"""
import asyncio
import replicas.replica
from replicas.exchange import read_call

async def main():
    replicas.replica.SERVE = "tests/fleet/forgetful.py"
    replica = replicas.replica.Replica()
    stream = replica.predict(read_call("PUT", "/predictions/one", {headers}, b"{{}}"))
    await anext(stream)  # it is about to be sent
    {end.strip()}
    print(await busy(replica))
    replica.__del__()  # as Serve ends it

async def follow(stream):
    async for _ in stream:
        pass

async def busy(replica):
    return b"BUSY" in (await replica.describe())["/health-check"].body

asyncio.run(main())
"""
    assert run(program) == "False"


def run(program: str) -> str:
    """Run Python with Ray installed; return what it prints."""
    result = subprocess.run(
        [ROOT / ".cog" / "fleet" / "bin" / "python", "-c", program],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": "script:.", "RAY_USAGE_STATS_ENABLED": "0"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return result.stdout.strip()
