"""How long a call is tried again, with pauses short enough for a test."""

import pytest

from moray.batch import retry as patience
from moray.batch.retry import StoreError, retry_with_backoff


class Store:
    """A store that fails a given number of times."""

    def __init__(self, failures: int, error: Exception) -> None:
        self.failures, self.error, self.calls = failures, error, 0

    def __call__(self) -> str:
        self.calls += 1
        if self.calls <= self.failures:
            raise self.error
        return "there"


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "RETRY_AFTER_S", (0.001, 0.001, 0.001))


def test_a_store_that_comes_back_in_time() -> None:
    store = Store(3, StoreError("away"))
    assert (retry_with_backoff(store, StoreError), store.calls) == ("there", 4)


def test_one_that_does_not() -> None:
    store = Store(9, StoreError("away"))
    with pytest.raises(StoreError, match="away"):
        retry_with_backoff(store, StoreError)
    assert store.calls == 4


def test_another_error_is_not_waited_for() -> None:
    store = Store(1, ValueError("wrong"))
    with pytest.raises(ValueError, match="wrong"):
        retry_with_backoff(store, StoreError)
    assert store.calls == 1
