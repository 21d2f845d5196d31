"""Serve's rolling update of the endpoint: the old replica finishes what it has, the new one answers what comes."""

import logging
import threading
import time
from collections.abc import Iterator

import pytest
from http_calls import MODEL, Reply, call, events
from made_jobs import TINY

from moray.serve.args import EndpointArgs

pytestmark = pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`")  # as Ray Serve is imported
PORT = 18431
URL = f"http://127.0.0.1:{PORT}/v1/completions"
LONG = {"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 1500, "ignore_eos": True, "stream": True}
SHORT = {"model": MODEL, "prompt": [5], "max_tokens": 10, "ignore_eos": True}


def deploy(**changes: int) -> None:
    from ray import serve

    from moray.jobs.app import build

    args = EndpointArgs.model_validate({"model": str(TINY), "dtype": "float32", "num_threads": 1} | changes)
    serve.run(build(args), name="moray", route_prefix="/")


def replica_states() -> list[str]:
    from ray import serve

    return list(map(str, serve.status().applications["moray"].deployments["moray"].replica_states))


@pytest.fixture
def deployed(one_cpu: None) -> Iterator[None]:
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": PORT})
    deploy()
    yield
    serve.shutdown()


@pytest.mark.slow
def test_nothing_is_lost_by_an_update(deployed: None) -> None:
    running: list[Reply] = []
    streams = [threading.Thread(target=lambda: running.append(call(URL, LONG))) for _ in range(4)]
    for stream in streams:
        stream.start()
    metrics = URL.replace("v1/completions", "metrics")
    while "moray_seqs 4.0" not in call(metrics).text:
        time.sleep(0.02)
    updating = threading.Thread(target=deploy, kwargs={"max_tokens_cap": 9})
    updating.start()
    came: list[Reply] = []
    while not running and "STOPPING" not in replica_states():
        time.sleep(0.02)
    assert not running, "all were in flight when the old replica was told to end"
    while not came or came[-1].status == 200:
        came.append(call(URL, SHORT))
    assert [reply.status for reply in came[:-1]] == [200] * (len(came) - 1)
    assert came[-1].error["message"] == "max_tokens: is 10; this endpoint gives at most 9"
    for stream in streams:
        stream.join(120)
    updating.join(120)
    ends = [events(reply.text)[-1]["choices"][0]["finish_reason"] for reply in running]
    assert ends == ["length"] * 4, "the old replica finished what it had"
