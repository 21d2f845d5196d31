"""Browsers and load balancers: preflight requests and HEAD."""

import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from http_calls import MODEL, call
from patience import PATIENCE_S
from pydantic import ValidationError
from served import Served, served

from moray.serve.args import EndpointArgs

PAGE = "http://localhost:3000"


def send(method: str, url: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(url, method=method, headers=names)
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as reply:
            return reply.status, {k.lower(): v for k, v in reply.headers.items()}, reply.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, {k.lower(): v for k, v in error.headers.items()}, error.read()


@pytest.mark.parametrize("path", ["/health", "/ready", "/v1/models", "/"])
def test_head_is_get_without_a_body(local: Served, path: str) -> None:
    status, headers, body = send("HEAD", f"{local.url}{path}")
    got = send("GET", f"{local.url}{path}")
    assert (status, body) == (200, b"") and got[0] == 200
    assert headers["content-length"] == got[1]["content-length"] == str(len(got[2]))


def test_head_of_what_is_not_there(local: Served) -> None:
    assert send("HEAD", f"{local.url}/v2")[0] == 404
    assert send("HEAD", f"{local.url}/v1/completions")[0] == 405


def test_without_origins_no_page_may(local: Served) -> None:
    asked = {"Origin": PAGE, "Access_Control_Request_Method": "POST"}
    status, headers, _ = send("OPTIONS", f"{local.url}/v1/chat/completions", **asked)
    assert status == 405 and not any(name.startswith("access-control") for name in headers)


@pytest.fixture(scope="module")
def with_keys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    keys = tmp_path_factory.mktemp("keys") / "keys.txt"
    keys.write_text("secret\n")
    with served(keys_file=str(keys), cors_origins=[PAGE]) as endpoint:
        yield endpoint


def test_a_page_that_may(with_keys: Served) -> None:
    url = f"{with_keys.url}/v1/completions"
    asked = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "authorization,content-type"}
    status, headers, _ = send("OPTIONS", url, Origin=PAGE, **asked)
    assert status == 200 and headers["access-control-allow-origin"] == PAGE
    assert headers["access-control-allow-headers"] == "authorization,content-type"
    body = {"model": MODEL, "prompt": [5], "max_tokens": 1}
    reply = call(url, body, {"Origin": PAGE, "Authorization": "Bearer secret"})
    assert (reply.status, reply.headers["access-control-allow-origin"]) == (200, PAGE)
    assert "retry-after" in reply.headers["access-control-expose-headers"].lower()
    refused = call(url, body, {"Origin": PAGE})
    assert (refused.status, refused.headers["access-control-allow-origin"]) == (401, PAGE)


def test_a_page_that_may_not(with_keys: Served) -> None:
    asked = {"Origin": "https://elsewhere.example", "Access_Control_Request_Method": "POST"}
    status, headers, _ = send("OPTIONS", f"{with_keys.url}/v1/completions", **asked)
    assert status == 400 and "access-control-allow-origin" not in headers


@pytest.mark.parametrize("origin", ["localhost:3000", "https://a.example/", "https://a.example/page", "", 5])
def test_origins_that_are_none(origin: Any) -> None:
    with pytest.raises(ValidationError, match="cors_origins"):
        EndpointArgs(model="m", cors_origins=[origin])
