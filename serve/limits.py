"""Admission: how much may be in the endpoint at once, in all and by key. Pure: the clock is given."""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from serve.openai.errors import ApiError

MINUTE_S = 60.0


class Admission:
    """Admits requests or says when to come again.

    max_samples:     most samples in the endpoint, running or waiting
    max_concurrent:  most requests of a key at once; None = no limit
    max_per_minute:  most requests of a key a minute, spent evenly after a first burst; None = no limit
    """

    def __init__(
        self,
        max_samples: int,
        max_concurrent: int | None = None,
        max_per_minute: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_samples = max_samples
        self._max_concurrent = max_concurrent
        self._max_per_minute = max_per_minute
        self._clock = clock
        self.num_samples = 0
        self._concurrent: dict[str, int] = defaultdict(int)
        self._spent_until: dict[str, float] = {}  # key -> when all that it has spent is earned again
        self._seconds = 1.0  # that a request takes, of late

    @contextmanager
    def admit(self, key: str, num_samples: int) -> Iterator[None]:
        """Hold places while the request runs. Raises ApiError: 429 with Retry-After, 400 for what can never fit."""
        if num_samples > self._max_samples:
            raise ApiError(
                400,
                "too_many_samples",
                f"the request asks for {num_samples} samples (prompts x n); this endpoint takes {self._max_samples} "
                "at once. Send several requests.",
                param="n",
            )
        self._check(key, num_samples)
        started = self._clock()
        self._spend(key)
        self._concurrent[key] += 1
        self.num_samples += num_samples
        try:
            yield
        finally:
            self._seconds += 0.1 * (self._clock() - started - self._seconds)
            self.num_samples -= num_samples
            self._concurrent[key] -= 1
            if not self._concurrent[key]:
                del self._concurrent[key]

    def _check(self, key: str, num_samples: int) -> None:
        limit = self._max_concurrent
        if limit is not None and self._concurrent.get(key, 0) >= limit:
            raise _busy("rate_limit_exceeded", f"this key has {limit} requests running, its limit", self._seconds)
        if (wait_s := self._wait_s(key)) > 0:
            message = f"this key has sent {self._max_per_minute} requests a minute, its limit"
            raise _busy("rate_limit_exceeded", message, wait_s)
        if self.num_samples + num_samples > self._max_samples:
            message = f"the endpoint is full: {self.num_samples} samples run or wait, {self._max_samples} may"
            raise _busy("overloaded", message, self._seconds)

    def _wait_s(self, key: str) -> float:
        """Until the key may send again."""
        if self._max_per_minute is None:
            return 0.0
        price_s = MINUTE_S / self._max_per_minute
        return self._spent_until.get(key, 0.0) - self._clock() + price_s - MINUTE_S

    def _spend(self, key: str) -> None:
        if self._max_per_minute is not None:
            now = self._clock()
            for other in [k for k, until in self._spent_until.items() if until < now]:
                del self._spent_until[other]
            self._spent_until[key] = max(now, self._spent_until.get(key, 0.0)) + MINUTE_S / self._max_per_minute


def _busy(code: str, message: str, wait_s: float) -> ApiError:
    seconds = max(1, math.ceil(wait_s))
    return ApiError(429, code, f"{message}; try again in {seconds} s", headers={"Retry-After": str(seconds)})
