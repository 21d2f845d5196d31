"""`moray serve`: mistakes are told before Ray is started, and Ctrl-C ends it at any moment."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.request import urlopen
from uuid import uuid4

import left_behind
import pytest
from moray_serve import MorayServe


def serve(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).with_name("moray"), "serve", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--host", "0.0.0.0"), "host is 0.0.0.0 and no keys are configured, so anybody could use the endpoint."),
        (("--set", "keys_file=/nowhere"), "keys_file: [Errno 2] No such file or directory: '/nowhere'"),
        (("--set", "max_wating=5"), "max_wating: Extra inputs are not permitted"),
        (("--set", "max_waiting=-5"), "max_waiting: Input should be greater than or equal to 0"),
        (("--set", "max_waiting"), "--set must be KEY=VALUE, is 'max_waiting'"),
        (("--dtype", "int3"), "dtype: Input should be 'auto', 'float32', 'float16' or 'bfloat16'"),
        (("--model", "/nowhere"), "/nowhere"),
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
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    done = serve("--port", str(port), "--set", "kv_cache_memory=1")
    assert done.returncode == 1
    assert "the endpoint did not start: " in done.stderr
    assert "engine.kv_cache_memory: must hold a block of 16 tokens, 16,384 bytes, is 1\n" in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


class Starting(MorayServe):
    """An endpoint that is told to end before anybody has waited for it."""

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def answers(self) -> bool:
        with suppress(OSError):
            return urlopen(f"{self.url}/ready", timeout=5).status == 200  # type: ignore[no-any-return]
        return False

    def interrupt(self) -> None:
        """As a terminal does: the signal goes to every process of the group."""
        os.killpg(self.process.pid, signal.SIGINT)


@pytest.fixture
def starting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Starting]:
    tag = uuid4().hex
    monkeypatch.setenv(left_behind.TAG, tag)
    endpoint = Starting("--dtype", "float32")
    assert endpoint.line().startswith("Loading ")
    yield endpoint
    endpoint.process.communicate(timeout=60)
    left_behind.wait_until_gone(tag)


@pytest.mark.slow
def test_ctrl_c_while_ray_starts(starting: Starting) -> None:
    starting.interrupt()
    assert starting.process.communicate(timeout=60)[0] == "Stopped before it was served\n"
    assert starting.process.returncode == 0


@pytest.mark.slow
def test_sigterm_while_ray_starts(starting: Starting) -> None:
    tag = os.environ[left_behind.TAG]
    starting.wait_for(lambda: any("gcs_server" in process for process in left_behind.processes(tag)))
    starting.process.send_signal(signal.SIGTERM)
    assert starting.process.communicate(timeout=60)[0] == "Stopped before it was served\n"
    assert starting.process.returncode == 0


def test_ctrl_c_while_the_model_is_loaded(starting: Starting) -> None:
    starting.wait_for(starting.replicas)
    starting.interrupt()
    assert starting.process.communicate(timeout=60)[0] == "Stopped before it was served\n"
    assert starting.process.returncode == 0


@pytest.mark.slow
def test_ctrl_c_as_soon_as_it_answers(starting: Starting) -> None:
    """Which is before it says so."""
    starting.wait_for(starting.answers)
    starting.interrupt()
    output = starting.process.communicate(timeout=60)[0]
    assert output.endswith(("Stopped before it was served\n", "Finishing what runs; a second signal ends at once\n"))
    assert starting.process.returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("is_loading", [False, True])
def test_a_second_ctrl_c_ends_at_once(starting: Starting, is_loading: bool) -> None:
    if is_loading:
        starting.wait_for(starting.replicas)
    starting.interrupt()
    starting.interrupt()
    assert starting.process.communicate(timeout=60)[0] in ("", "Stopped before it was served\n")
    assert starting.process.returncode in (0, 128 + signal.SIGINT)
