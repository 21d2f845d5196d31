"""`moray serve`: mistakes are reported before Ray is started, and Ctrl-C ends it at any moment."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.request import urlopen
from uuid import uuid4

import left_behind
import pytest
from moray_serve import MorayServe
from patience import PATIENCE_S
from ports import free_port
from ray_cluster import TOKENS, RayNodes


def serve(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).with_name("moray"), "serve", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--host", "0.0.0.0"), "host is 0.0.0.0 and no keys are configured, so anybody could use the endpoint."),
        (("--set", "keys_file=/nowhere"), "keys_file: [Errno 2] No such file or directory: '/nowhere'"),
        (
            ("--dtype", "int3", "--set", "a=1"),
            "are wrong:\n  dtype: must be one of auto, float32, float16, bfloat16, is 'int3'\n  a: unknown key; ",
        ),
        (("--set", "name=["), "--set name: '[' is not YAML: expected the node content, but found '<stream end>'"),
        (("--model", "/nowhere"), "/nowhere"),
        (
            ("--set", "expert_parallel=true"),
            "expert_parallel: is true, and there is one rank; set engine.tensor_parall",
        ),
        (("--host", "1.2.3.4", "--set", "is_public=true"), "cannot listen on 1.2.3.4:8000: "),
    ],
)
def test_mistakes(arguments: tuple[str, ...], message: str) -> None:
    done = serve(*arguments)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr


def test_a_port_that_is_taken() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        done = serve("--port", str(port))
    assert done.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use. Choose another --port or --host." in done.stderr


@pytest.mark.slow
def test_an_engine_that_cannot_be_made() -> None:
    port = free_port()
    done = serve("--port", str(port), "--set", "kv_cache_memory=1")
    assert done.returncode == 1
    assert "the endpoint did not start: " in done.stderr
    assert "engine.kv_cache_memory: must hold a block of 16 tokens, 16,384 bytes, is 1\n" in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


class Starting(MorayServe):
    """Starts an endpoint that a signal may end while it starts."""

    def end_after_loading(self) -> tuple[int, str]:
        """Wait until it has ended; return its exit code and what it has printed after its first line."""
        code, output = self.end()
        return code, output.removeprefix(self.lines[0])

    def answers(self) -> bool:
        with suppress(OSError):
            return urlopen(f"{self.url}/ready", timeout=5).status == 200  # type: ignore[no-any-return]
        return False

    def interrupt(self) -> None:
        """Send a signal as a terminal does: to every process of the group."""
        os.killpg(self.process.pid, signal.SIGINT)


@pytest.fixture
def starting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Starting]:
    tag = uuid4().hex
    monkeypatch.setenv(left_behind.TAG, tag)
    endpoint = Starting("--dtype", "float32")
    endpoint.wait_for(lambda: endpoint.lines)
    assert endpoint.lines[0].startswith("Loading ")
    yield endpoint
    endpoint.end()
    left_behind.wait_until_gone(tag)


@pytest.mark.slow
def test_ctrl_c_while_ray_starts(starting: Starting) -> None:
    starting.interrupt()
    assert starting.end_after_loading() == (128 + signal.SIGINT, "Stopped before the endpoint was up\n")


@pytest.mark.slow
def test_sigterm_while_ray_starts(starting: Starting) -> None:
    tag = os.environ[left_behind.TAG]
    starting.wait_for(lambda: any("gcs_server" in process for process in left_behind.processes(tag)))
    starting.process.send_signal(signal.SIGTERM)
    assert starting.end_after_loading() == (128 + signal.SIGTERM, "Stopped before the endpoint was up\n")


@pytest.mark.slow
def test_ctrl_c_while_the_model_is_loaded(starting: Starting) -> None:
    starting.wait_for(starting.replicas)
    starting.interrupt()
    assert starting.end_after_loading() == (128 + signal.SIGINT, "Stopped before the endpoint was up\n")


@pytest.mark.slow
def test_sigterm_for_the_whole_group(starting: Starting) -> None:
    """End it as `timeout` and systemd end what they have started."""
    starting.wait_for(starting.answers)
    os.killpg(starting.process.pid, signal.SIGTERM)
    assert starting.end()[0] in (0, 128 + signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.parametrize(("daemon", "name"), [("gcs_server", "GCS"), ("raylet/raylet", "raylet")])
def test_a_ray_that_dies_ends_the_endpoint_with_a_sentence(starting: Starting, daemon: str, name: str) -> None:
    starting.wait_for(starting.answers)
    (pid,) = (int(one.split()[0]) for one in left_behind.processes(os.environ[left_behind.TAG]) if daemon in one)
    os.kill(pid, signal.SIGKILL)
    code, output = starting.end()
    assert code == 1
    assert f"Ray's {name} died, and the endpoint with it\n" in output


@pytest.mark.slow
def test_ctrl_c_as_soon_as_it_answers(starting: Starting) -> None:
    """The endpoint serves shortly before it prints so."""
    starting.wait_for(starting.answers)
    starting.interrupt()
    code, output = starting.end()
    ends = {
        "Stopped before the endpoint was up": 128 + signal.SIGINT,
        "Finishing what runs; a second signal ends at once": 0,
    }
    assert code == ends[output.splitlines()[-1]]


@pytest.mark.slow
@pytest.mark.parametrize("is_loading", [False, True])
def test_a_second_ctrl_c_ends_at_once(starting: Starting, is_loading: bool) -> None:
    if is_loading:
        starting.wait_for(starting.replicas)
    starting.interrupt()
    starting.interrupt()
    code, output = starting.end_after_loading()
    assert code == 128 + signal.SIGINT and output in ("", "Stopped before the endpoint was up\n")


@pytest.mark.slow
def test_an_endpoint_that_this_machine_cannot_take() -> None:
    port = free_port()
    done = serve("--port", str(port), "--set", "num_cpus=1000")
    assert done.returncode == 1
    assert "the endpoint did not start: no node has 1000 CPUs; the cluster has 1 x " in done.stderr


@pytest.mark.slow
def test_a_proxy_that_is_never_ready_in_time() -> None:
    at_once = {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "0.0001"}
    endpoint = Starting("--dtype", "float32", "--set", "max_replicas=2", environment=at_once)
    try:
        endpoint.wait_for(lambda: any("Waiting for Ray Serve's proxy, " in line for line in endpoint.lines))
        endpoint.interrupt()
        assert endpoint.end_after_loading()[1].endswith("\nStopped before the endpoint was up\n")
    finally:
        endpoint.kill()


HOG = """
import sys, time, ray
ray.init(address=sys.argv[1], log_to_driver=False)


@ray.remote(num_cpus=1)
def be_busy(path):
    open(path, "w").close()
    time.sleep(1000)


ray.get(be_busy.remote(sys.argv[2]))
"""


@pytest.mark.slow
def test_an_endpoint_on_a_full_cluster_says_what_it_waits_for(tmp_path: Path) -> None:
    with TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        nodes = RayNodes(Path(folder), "--include-dashboard=false")
        command = [sys.executable, "-c", HOG, nodes.gcs_address, str(tmp_path / "busy")]
        hog = subprocess.Popen(command, env=nodes.environment)
        try:
            end_s = time.monotonic() + PATIENCE_S
            while not (tmp_path / "busy").exists():
                assert time.monotonic() < end_s and hog.poll() is None
                time.sleep(0.1)
            endpoint = Starting("--dtype", "float32", environment=TOKENS | {"RAY_ADDRESS": nodes.gcs_address})
            try:
                endpoint.wait_for(lambda: len(endpoint.lines) > 2)
            finally:
                endpoint.kill()
            assert endpoint.lines[2] == (
                "Waiting for Ray to schedule the endpoint, which asks for 0.5 CPUs: 1 of 1 nodes could run it, but are "
                "busy, or still starting its process\n"
            ), endpoint.lines
        finally:
            hog.kill()
            hog.wait()
            nodes.stop()
