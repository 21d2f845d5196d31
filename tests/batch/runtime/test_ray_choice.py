"""Which Ray a command uses, and wrong addresses that are reported before Ray tries them."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from made_jobs import make_spec, write_input
from patience import PATIENCE_S
from ports import free_port

from moray.batch.runtime import ray_choice
from moray.batch.runtime.driver import run_job
from moray.batch.runtime.ray_choice import check_address, choose_ray
from moray.engine.errors import UserError

SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])


@pytest.fixture(autouse=True)
def _no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def port() -> int:
    """Return a port on which nothing listens."""
    return free_port()


@contextmanager
def answering(family: socket.AddressFamily, host: str, answer: bytes) -> Iterator[int]:
    """Yield a port on which a server answers the first connection."""
    with socket.socket(family) as listener, ThreadPoolExecutor() as pool:
        listener.bind((host, 0))
        listener.listen()

        def serve() -> None:
            with listener.accept()[0] as connection:
                listener.close()  # a second connection is refused at once
                connection.recv(100)
                connection.sendall(answer)

        port = listener.getsockname()[1]
        served = pool.submit(serve)
        yield port
        served.result(10)


@pytest.mark.parametrize("address", ["nonsense", "", "host:", ":6379", "host:0", "host:65536", "anyscale://host:1"])
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(UserError, match=rf"^--address must be HOST:PORT of .*, auto on .*, is '{address}'$"):
        choose_ray(address)


def test_a_dashboards_address_is_for_another_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    pattern = (
        r"^RAY_ADDRESS is 'http://head:8265', .*: moray submit SPEC --address http://head:8265 runs .* takes HOST:PORT"
    )
    with pytest.raises(UserError, match=pattern):
        choose_ray()


def test_a_ray_client_address_is_refused_with_what_to_give_instead() -> None:
    pattern = (
        r"^--address is 'ray://head:10001': Ray Client cannot .* HOST:PORT .* --address http://head:8265 runs a job"
    )
    with pytest.raises(UserError, match=pattern):
        choose_ray("ray://head:10001")


@pytest.mark.parametrize("source", ["--address", "RAY_ADDRESS"])
def test_where_nobody_answers_no_folder_is_claimed(
    tmp_path: Path, port: int, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_input(tmp_path / "in/a.parquet", {"prompt": ["a"]})
    address = f"127.0.0.1:{port}"
    if source == "RAY_ADDRESS":
        monkeypatch.setenv(source, address)
    pattern = (
        rf"^no Ray cluster answers at {source} {address} \(tried for up to 10 s: Connection refused\)\. It must be "
    )
    with pytest.raises(UserError, match=pattern):
        run_job(make_spec(tmp_path), address=address if source == "--address" else None)
    assert not (tmp_path / "out").exists()


def test_a_name_that_can_be_none() -> None:
    with pytest.raises(UserError, match=r"^no Ray cluster answers at --address a\.\.b:6379 \(tried "):
        choose_ray("a..b:6379")


def test_nobody_is_waited_for_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """The listener accepts no connection, as behind a firewall."""
    monkeypatch.setattr(ray_choice, "CONNECT_S", 0.2)
    with socket.socket() as listener, socket.socket() as first, socket.socket() as second:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        where = listener.getsockname()
        for other in (first, second):  # its queue is full
            other.setblocking(False)
            other.connect_ex(where)
        began_s = time.monotonic()
        with pytest.raises(UserError, match="timed out"):
            choose_ray(f"127.0.0.1:{where[1]}")
        assert time.monotonic() - began_s < 5


def test_a_port_of_something_else_is_not_joined() -> None:
    """Ray itself would wait there for minutes."""
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as other, ThreadPoolExecutor() as pool:
        handled = pool.submit(other.handle_request)
        address = f"127.0.0.1:{other.server_port}"
        with pytest.raises(UserError, match=rf"^what answers at --address {address} is not the head of a Ray cluster"):
            choose_ray(address)
        handled.result(10)


def test_what_answers_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    for family, host, shown in ((socket.AF_INET, "127.0.0.1", "127.0.0.1"), (socket.AF_INET6, "::1", "[::1]")):
        if family is socket.AF_INET6 and not socket.has_dualstack_ipv6():
            continue
        with answering(family, host, SETTINGS) as port:
            check_address(f"{shown}:{port}")
    monkeypatch.setenv("RAY_USE_TLS", "1")  # without the certificate nobody knows what answers
    with answering(socket.AF_INET, "127.0.0.1", b"") as port:
        check_address(f"127.0.0.1:{port}")


def test_the_option_beats_the_variable_unless_it_is_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "nonsense")
    assert choose_ray("local").address is None
    for option in ("auto", None):
        with pytest.raises(UserError, match=r"^RAY_ADDRESS must be "):
            choose_ray(option)
    with answering(socket.AF_INET, "127.0.0.1", SETTINGS) as port:
        chosen = choose_ray(f"127.0.0.1:{port}")
    assert (chosen.address, chosen.remark) == (f"127.0.0.1:{port}", "")
    with answering(socket.AF_INET, "127.0.0.1", SETTINGS) as port:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
        chosen = choose_ray()
    assert chosen.address == f"127.0.0.1:{port}"
    assert chosen.remark == f"Using the Ray cluster at 127.0.0.1:{port}, as RAY_ADDRESS says."


@pytest.mark.parametrize("value", ["", " ", "local"])
def test_a_ray_of_its_own(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", value)
    assert choose_ray().address is None


def test_auto_where_no_cluster_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr(ray_choice, "find_clusters", list)  # leave out those of other tests
    with pytest.raises(UserError, match=r"^RAY_ADDRESS is auto, but no Ray cluster runs on this machine\. Start one"):
        choose_ray()
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray/ray_current_cluster").write_text("127.0.0.1:1")  # left by a cluster that was killed
    with pytest.raises(UserError, match=r"^no Ray cluster answers at RAY_ADDRESS 127.0.0.1:1 "):
        choose_ray()
    monkeypatch.setattr(ray_choice, "find_clusters", lambda: ["127.0.0.1:1", "127.0.0.1:2"])
    (tmp_path / "ray/ray_current_cluster").unlink()
    with pytest.raises(UserError, match=r"^RAY_ADDRESS is auto, but several .*: give one of 127.0.0.1:1, 127.0.0.1:2$"):
        choose_ray()
    monkeypatch.setattr(ray_choice, "find_clusters", lambda: ["127.0.0.1:2"])
    with pytest.raises(UserError, match=r"^no Ray cluster answers at RAY_ADDRESS 127.0.0.1:2 "):
        choose_ray()


def test_rays_folder_is_where_its_sockets_have_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    assert choose_ray() == ray_choice.RayChoice()
    monkeypatch.setenv("TMPDIR", "/var/tmp")
    assert choose_ray() == ray_choice.RayChoice(parent=Path("/var/tmp"))
    monkeypatch.setenv("RAY_TMPDIR", "/nowhere")
    assert choose_ray().remark == (
        "Ray's files go to /var/tmp: RAY_TMPDIR /nowhere cannot be written (No such file or directory)."
    )
    long = tmp_path / ("x" * 80)
    long.mkdir()
    monkeypatch.delenv("RAY_TMPDIR")
    monkeypatch.setenv("TMPDIR", str(long))
    chosen = choose_ray()
    assert chosen.parent == Path("/tmp")
    size = len(str(long))
    assert chosen.remark == (
        f"Ray's files go to /tmp: TMPDIR {long} is {size} bytes long: with the names of Ray's sockets behind it that "
        f"makes {size + 87}, and the system takes 107, which leaves 20 for the folder."
    )
    monkeypatch.setattr(ray_choice, "MAX_PARENT", 3)
    with pytest.raises(UserError, match=r"^no folder can hold the files of Ray: TMPDIR .*; /var/tmp is 8 bytes long: "):
        choose_ray()


def test_a_folder_is_removed_though_somebody_still_writes_to_it(tmp_path: Path) -> None:
    folder = ray_choice.make_folder(tmp_path)
    writes = "import sys, time; [open(f'{sys.argv[1]}/{i}', 'w') or time.sleep(0.001) for i in range(10**6)]"
    writer = subprocess.Popen([sys.executable, "-c", writes, folder], stderr=subprocess.DEVNULL)
    while not any(folder.iterdir()):
        time.sleep(0.01)
    ray_choice.remove_folder(folder)
    assert not folder.exists() and writer.wait(PATIENCE_S) == 1


def test_a_folder_is_found_by_its_token_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    mine, other = ray_choice.make_folder(tmp_path, "0123456789abcdef"), ray_choice.make_folder(tmp_path)
    (tmp_path / f"moray-{os.getpid()}-12345678").mkdir()
    assert ray_choice.find_folders("0123456789abcdef") == [mine] != [other]
    assert mine.stat().st_mode & 0o777 == other.stat().st_mode & 0o777 == 0o700
    assert len(mine.name) == len(other.name)


START_IN = """
import os, sys
from pathlib import Path
import ray
ray.init("local", num_cpus=1, include_dashboard=False, object_store_memory=80_000_000, _temp_dir=sys.argv[1])
print("started")
"""


@pytest.mark.slow
def test_the_longest_accepted_folder_is_one_that_ray_accepts() -> None:
    parent = Path("/tmp") / f"longest-{os.getpid()}-".ljust(ray_choice.MAX_PARENT - len("/tmp/"), "x")
    parent.mkdir()
    try:
        folder = ray_choice.make_folder(choose_in(parent))
        done = subprocess.run(
            [sys.executable, "-c", START_IN, folder], env=os.environ | {"RAY_AUTH_MODE": "disabled"},
            capture_output=True, text=True, timeout=PATIENCE_S, check=False,
        )  # fmt: skip
        assert done.stdout == "started\n", done.stderr
    finally:
        subprocess.run(["rm", "-r", parent], check=True)


def choose_in(parent: Path) -> Path:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("RAY_TMPDIR", str(parent))
        assert choose_ray().parent == parent
    return parent


def test_no_ray_is_started_by_a_call_after_its_shutdown() -> None:
    code = (
        "from moray.batch.runtime.ray_choice import prepare_environment; prepare_environment(is_local=True)\n"
        "import ray\n"
        "try: ray.put(1)\n"
        "except Exception as error: print(type(error).__name__, ray.is_initialized())"
    )
    bare = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run([sys.executable, "-c", code], env=bare, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.stdout.split()[-1:] == ["False"], done.stderr
