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
    while (await health(replica))["status"] != "BUSY":
        await asyncio.sleep(0.01)
    sent.cancel()
"""
CANCEL_EARLY = """
    sent = asyncio.create_task(follow(stream))
    await asyncio.sleep(0.1)  # the server has it, and says that it is free
    sent.cancel()
"""
CLOSE = """
    await anext(stream)  # the answer
    await stream.aclose()
"""


@pytest.mark.parametrize(
    ("headers", "end"),
    [("{}", CANCEL), (ASYNCHRONOUS, CANCEL), (ASYNCHRONOUS, CANCEL_EARLY), (ASYNCHRONOUS, CLOSE)],
    ids=["synchronous", "asynchronous", "early", "closed"],
)
def test_a_replica_cancels_until_its_server_is_free_for_the_next(headers: str, end: str) -> None:
    program = f"""
import asyncio, json
import replicas.replica
from replicas.exchange import read_call

async def main():
    replicas.replica.SERVE = "tests/fleet/forgetful.py"
    replica = replicas.replica.Replica()
    call = read_call("PUT", "/predictions/one", {headers}, b"{{}}")
    stream = replica.predict(call)
    await anext(stream)  # it is about to be sent
    {end.strip()}
    await anext(replica.predict(call))  # the next one is about to be sent
    print(await health(replica))
    replica.__del__()  # as Serve ends it

async def follow(stream):
    async for _ in stream:
        pass

async def health(replica):
    return json.loads((await replica.describe())["/health-check"].body)

asyncio.run(main())
"""
    assert run(program) == "{'status': 'READY', 'cancels': 2}"


def run(program: str) -> str:
    """Run Python with Ray installed; return what it prints."""
    result = subprocess.run(
        [ROOT / ".cog" / "fleet" / "bin" / "python", "-c", program],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": "script:.", "RAY_USAGE_STATS_ENABLED": "0"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=60,
    )
    return result.stdout.strip()
