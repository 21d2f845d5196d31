"""Patience with object stores: one that is away for a moment is no end of a job."""

import time
from collections.abc import Callable
from typing import TypeVar

from engine.errors import JobError

RETRY_AFTER_S = (1.0, 2.0, 4.0, 8.0)  # and before each, the client of the store has tried for some seconds itself

T = TypeVar("T")


class StoreError(JobError):
    """An object store does not answer as it should, for now."""


def patiently(call: Callable[[], T], error: type[Exception]) -> T:
    """What `call` returns, at the first time that it does not raise such an error; the last one is let through."""
    for seconds in RETRY_AFTER_S:
        try:
            return call()
        except error:
            time.sleep(seconds)
    return call()
