"""script/fleet as a command, and the config file for a cluster."""

import subprocess

from tests.fleet.running import ROOT, run


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
