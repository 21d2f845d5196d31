"""An address where no cluster is, told before Ray tries."""

import socket
import time
from pathlib import Path

import pytest
from made_jobs import make_spec, write_input

from batch import ray_session
from batch.driver import run_job
from batch.ray_session import check_address
from engine.errors import UserError


@pytest.fixture
def port() -> int:
    """One where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("address", ["nonsense", "", "host:", ":6379", "host:0", "host:65536", "anyscale://host:1"])
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(UserError, match=rf"^--address must be HOST:PORT of .*, or auto .*, is '{address}'$"):
        check_address(address)


def test_a_dashboards_address_is_for_another_command() -> None:
    with pytest.raises(UserError, match=r"is 'http://127\.0\.0\.1:8265'; a dashboard's is for moray submit$"):
        check_address("http://127.0.0.1:8265")


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_where_nobody_answers_no_folder_is_claimed(tmp_path: Path, port: int, scheme: str) -> None:
    write_input(tmp_path / "in/a.parquet", {"prompt": ["a"]})
    address = f"{scheme}127.0.0.1:{port}"
    told = rf"^no Ray cluster answers at --address {address} \(tried for up to 10 s: Connection refused\)\. It must be "
    with pytest.raises(UserError, match=told):
        run_job(make_spec(tmp_path), address=address)
    assert not (tmp_path / "out").exists()


def test_a_name_that_can_be_none() -> None:
    with pytest.raises(UserError, match=r"^no Ray cluster answers at --address a\.\.b:6379 \(tried "):
        check_address("a..b:6379")


def test_nobody_is_waited_for_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """A listener that takes no connection, as behind a firewall."""
    monkeypatch.setattr(ray_session, "CONNECT_S", 0.2)
    with socket.socket() as listener, socket.socket() as first, socket.socket() as second:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        where = listener.getsockname()
        for other in (first, second):  # its queue is full
            other.setblocking(False)
            other.connect_ex(where)
        began_s = time.monotonic()
        with pytest.raises(UserError, match="timed out"):
            check_address(f"127.0.0.1:{where[1]}")
        assert time.monotonic() - began_s < 5


def test_what_answers_passes() -> None:
    for family, host, address in ((socket.AF_INET, "127.0.0.1", "127.0.0.1"), (socket.AF_INET6, "::1", "[::1]")):
        if family is socket.AF_INET6 and not socket.has_dualstack_ipv6():
            continue
        with socket.socket(family) as listener:
            listener.bind((host, 0))
            listener.listen()
            check_address(f"{address}:{listener.getsockname()[1]}")
            check_address(f"ray://{address}:{listener.getsockname()[1]}")
    check_address("auto")
    check_address("local")
