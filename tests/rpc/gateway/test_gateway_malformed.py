"""Whatever is sent to the gateway, it never answers with an internal error, and errors have OpenAI's format."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.support.clusters.running_gateway import RunningGateway, running_gateway
from tests.support.fakes.fake_router import FakeRouter
from tests.support.malformed.malformed_http import GENERATED, assert_in_openais_form, send_bad_requests
from tests.support.waiting import wait_until

EXAMPLES = 40  # of each operation
CHECKS = [not_a_server_error, response_schema_conformance, status_code_conformance, content_type_conformance]


@pytest.fixture(scope="module")
def gateway() -> Iterator[RunningGateway]:
    with FakeRouter() as router, running_gateway([router.address]) as serving:
        yield serving


@pytest.fixture(scope="module")
def operations(gateway: RunningGateway) -> dict[str, Any]:
    schema: Any = schemathesis.openapi.from_url(f"{gateway.url}/openapi.json")
    return {found.ok().label: found.ok() for found in schema.get_all_operations()}


def test_malformed_requests_are_refused_in_openais_form(gateway) -> None:
    seen = send_bad_requests(gateway.url, GENERATED)
    assert set(seen) <= {200, 400, 404, 405} and seen[400] > GENERATED / 3 and seen[200] > 10, seen
    admission = gateway.server.gateway.admission
    wait_until(lambda: (admission.requests, admission.generations, admission.body_bytes) == (0, 0, 0))
    ok = httpx.post(f"{gateway.url}/v1/completions", json={"model": "model", "prompt": "x"})
    assert ok.status_code == 200, "it serves on"


@pytest.mark.parametrize(
    "label",
    ["POST /v1/completions", "POST /v1/chat/completions", "GET /v1/models", "GET /v1/models/{name}", "GET /health"],
)
def test_the_schema_says_what_is_taken_and_what_is_answered(gateway, operations, label) -> None:
    operation = operations[label]

    @settings(
        max_examples=EXAMPLES,
        database=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
        deadline=None,
        phases=[Phase.generate],
    )
    @operation_cases(operation)
    def check(case: Any) -> None:
        if isinstance(case.body, dict) and "model" in case.body:
            case.body["model"] = "model"  # else most cases would fail here
        answer = case.call(timeout=30.0)
        case.validate_response(answer, checks=CHECKS)
        assert_in_openais_form(answer.status_code, answer.content, case)

    check()


def operation_cases(operation: Any) -> Any:
    """Half of the cases fit the schema, half do not."""
    modes = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]
    strategies = [operation.as_strategy(generation_mode=mode) for mode in modes]
    return given(case=strategies[0] | strategies[1])
