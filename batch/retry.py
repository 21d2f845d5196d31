"""Retries with backoff for object stores: one that fails for a moment must not end a job."""

import time
from collections.abc import Callable
from typing import TypeVar

from moray.engine.errors import JobError

# Seconds to wait before each further attempt. Before it fails, each attempt is repeated for some seconds by the store's
# client itself.
RETRY_AFTER_S = (1.0, 2.0, 4.0, 8.0)

T = TypeVar("T")


class StoreError(JobError):
    """Means that an object store fails at the moment; a later attempt may succeed."""


def retry_with_backoff(call: Callable[[], T], error: type[Exception]) -> T:
    """Return the result of the first call that does not raise `error`.

    The error of the last attempt is raised.
    """
    for seconds in RETRY_AFTER_S:
        try:
            return call()
        except error:
            time.sleep(seconds)
    return call()
