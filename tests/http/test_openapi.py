"""Requests that schemathesis makes from the served OpenAPI document, right and wrong ones.

Every answer must have a status and a form that the document has. References are taken out, since no
made-up address may be asked for anything, and the pictures are made small.
"""

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case, GenerationMode, Response
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from serving.server import Server
from tests.support.inputs import SMALL

REFERENCES = ("image", "mask", "replicate_weights", "extra_lora")
WORK = {"num_inference_steps": 1, "num_outputs": 1, **SMALL}
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
RIGHT, WRONG = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
OPERATIONS = [
    ("GET", "/", RIGHT),
    ("GET", "/health-check", RIGHT),
    ("POST", "/predictions", RIGHT),
    ("POST", "/predictions", WRONG),
    ("POST", "/predictions/{prediction_id}/cancel", RIGHT),
]


@pytest.fixture(scope="module")
def document(server) -> dict[str, Any]:
    return server.server.request("GET", "/openapi.json").json()


def test_every_operation_is_tried(document) -> None:
    found = {(m.upper(), path) for path, methods in document["paths"].items() for m in methods}
    assert found == {(method, path) for method, path, _ in OPERATIONS}


@pytest.mark.parametrize(("method", "path", "mode"), OPERATIONS)
def test_answers_are_those_of_the_document(server, document, method, path, mode) -> None:
    operation = schemathesis.openapi.from_dict(document)[path][method]

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=25,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def answers(case: Case) -> None:
        made_small(case)
        response = answer(case, server.server)
        if not is_missing_in_the_document(path, response):
            case.validate_response(response, checks=CHECKS)

    answers()
    assert server.generate(**SMALL).image.size == (256, 256)


def answer(case: Case, server: Server) -> Response:
    """Send a request with our own client, which repeats the 409 between two predictions."""
    options = case.as_transport_kwargs(base_url=server.url)
    path = options.pop("url").removeprefix(server.url)
    return Response.from_requests(server.request(path=path, timeout=60, **options), verify=True)


def is_missing_in_the_document(path: str, response: Response) -> bool:
    """Whether an answer is one that Cog's server gives and its document does not have."""
    if response.status_code == 404:
        return path.endswith("/cancel")  # no such prediction
    unreadable = ("Failed to parse the request body", "Failed to deserialize the JSON body")
    return response.status_code in (400, 422) and response.text.startswith(unreadable)


def made_small(case: Case) -> None:
    """Take references out of a request, and make the picture small where its type is right."""
    if isinstance(case.body, dict) and isinstance(given := case.body.get("input"), dict):
        kinds = {k: (int, float) if isinstance(v, int) else str for k, v in WORK.items()}
        work = {k: v for k, v in WORK.items() if isinstance(given.get(k, v), kinds[k])}
        case.body["input"] = {k: v for k, v in given.items() if k not in REFERENCES} | work
