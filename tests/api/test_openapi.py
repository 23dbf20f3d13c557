"""schemathesis against the served OpenAPI: whatever it sends, nothing ends in a 5xx."""

from __future__ import annotations

from typing import Any

import schemathesis
from hypothesis import HealthCheck, given, settings
from serving import Running

APART = ("/v1/models/load", "/v1/models/unload")
"""They would take the model from other tests; test_keys_and_models.py has them."""
LEAST = 20
"""Operations that the document has, at least."""


def test_nothing_ends_in_a_server_error(server: Running) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) >= LEAST
    sent = 0
    for operation in operations:
        if operation.path in APART:
            continue

        @settings(
            max_examples=10,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def send(case: Any) -> None:
            nonlocal sent
            sent += 1
            answer = case.call(timeout=30)
            assert answer.status_code < 500, (case.as_curl_command(), answer.text)

        send()
    assert sent > 100
