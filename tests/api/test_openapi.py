"""schemathesis against the served OpenAPI: whatever it sends, nothing ends in a 5xx."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from serving import Running

schema = schemathesis.pytest.from_fixture("described")


@pytest.fixture(scope="session")
def described(server: Running) -> Iterator[object]:
    yield schemathesis.openapi.from_url(f"{server.url}/openapi.json")


@schema.parametrize()
@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
def test_nothing_ends_in_a_server_error(case: schemathesis.Case) -> None:
    if case.path in ("/v1/models/load", "/v1/models/unload"):
        pytest.skip("would take the model from other tests; test_models.py has them")
    case.call_and_validate(checks=[not_a_server_error], timeout=30)
