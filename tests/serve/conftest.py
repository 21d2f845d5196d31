from collections.abc import Iterator

import pytest
from moray_serve import MorayServe
from served import Served, served


@pytest.fixture(scope="session")
def local() -> Iterator[Served]:
    """The tiny model in fp32, without Serve around it."""
    with served() as endpoint:
        yield endpoint


@pytest.fixture(scope="session")
def moray_serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MorayServe]:
    """`moray serve` of the tiny model in fp32 with batches: Serve, its replica and the coordinator."""
    store = tmp_path_factory.mktemp("batches") / "store"
    endpoint = MorayServe("--dtype", "float32", "--set", "max_num_seqs=16", "--batches", str(store))
    try:
        endpoint.wait_ready()
        yield endpoint
    finally:
        code, _ = endpoint.stop()
    assert code == 0
