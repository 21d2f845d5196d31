"""Requests made up from our own OpenAPI description: none may break the endpoint, and answers are as described."""

import contextlib
import re
from collections import Counter
from typing import Any

import hypothesis
import pytest
import schemathesis
from http_calls import MODEL, call
from schemathesis.checks import (
    content_type_conformance,
    not_a_server_error,
    response_schema_conformance,
    status_code_conformance,
)
from served import Served, served

# What hardly a request made up gets past; each is sent with these too, so that something runs.
TAME = {
    "model": MODEL, "max_tokens": 4, "max_completion_tokens": None, "min_tokens": 0, "prompt": "Add", "seed": 1,
    "messages": [{"role": "user", "content": "Add"}], "logit_bias": {"5": 1}, "stop_token_ids": [7], "logprobs": None,
    "top_logprobs": None, "tokens": [5, 6], "n": 2, "echo": True,
}  # fmt: skip


CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Answers of a few tokens: what is wrong with a request shows in the first."""
    store = tmp_path_factory.mktemp("store")
    with served(max_tokens_cap=8, max_model_len=256, batch_store=str(store)) as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def schema(short: Served) -> Any:
    return schemathesis.openapi.from_url(f"{short.url}/openapi.json")


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
def test_no_request_breaks_the_endpoint(schema: Any, mode: schemathesis.GenerationMode) -> None:
    """mode: requests as described, and requests that are not."""
    statuses: Counter[int] = Counter()

    def check(case: Any) -> None:
        made = case.body
        for body in (made, {k: TAME.get(k, v) for k, v in made.items()}) if isinstance(made, dict) else (made,):
            case.body = body
            response = case.call()
            case.validate_response(response, checks=CHECKS)
            if response.status_code >= 400:
                error = response.json()["error"]
                assert error.keys() == {"message", "type", "param", "code"}
                assert not re.search(r"Input should|Extra inputs|Field required|Value error", error["message"])
            statuses[response.status_code] += 1

    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) == 19
    for operation in operations:
        cases = operation.as_strategy(generation_mode=mode)
        settings = hypothesis.settings(
            max_examples=10, database=None, suppress_health_check=list(hypothesis.HealthCheck)
        )
        with contextlib.suppress(hypothesis.errors.Unsatisfiable):  # a GET without parameters cannot be wrong
            settings(hypothesis.given(cases)(check))()
    expected = 200 if mode is schemathesis.GenerationMode.POSITIVE else 400
    assert statuses[expected] > 40, statuses


def test_every_body_names_its_fields(short: Served) -> None:
    schemas = call(f"{short.url}/openapi.json").json["components"]["schemas"]
    for name in ("CompletionBody", "ChatBody", "ScoreParameters"):
        assert schemas[name]["additionalProperties"] is False and len(schemas[name]["properties"]) > 10
    temperature, _ = schemas["ChatBody"]["properties"]["temperature"]["anyOf"]
    assert temperature == {"type": "number", "minimum": 0.0, "maximum": 10.0}
