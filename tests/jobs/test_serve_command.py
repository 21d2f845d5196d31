"""`moray serve`: mistakes are told before Ray is started."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest


def serve(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).with_name("moray"), "serve", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


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
