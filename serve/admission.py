"""AdmissionController bounds the work in the endpoint, in all and by key. It is pure: the caller gives the clock."""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from moray.serve.errors import ApiError

MINUTE_S = 60.0


class AdmissionController:
    """Admits a request, or refuses it with the time after which to try again.

    max_samples:     most samples in the endpoint, running or waiting
    max_concurrent:  most requests of a key at once; None = no limit
    max_per_minute:  most requests of a key a minute; a first burst may use all of them, after that the key earns
                     them back evenly over the minute. None = no limit
    clock:           returns seconds that never go back
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
        self._full_again_s: dict[str, float] = {}  # key -> when it has earned back all requests of its minute
        self._mean_request_s = 1.0  # moving average of how long requests take; 1 s until one has ended

    @contextmanager
    def admit(self, key: str, num_samples: int) -> Iterator[None]:
        """Count `num_samples` as in the endpoint while the context is open.

        Raises ApiError: 429 with Retry-After where there is no room now, 400 where there can never be.
        """
        if num_samples > self._max_samples:
            raise ApiError(
                400,
                "too_many_samples",
                f"the request asks for {num_samples} samples (prompts x n); this endpoint accepts at most "
                f"{self._max_samples} at once. Send several requests.",
                param="n",
            )
        self._check(key, num_samples)
        started_s = self._clock()
        self._count_request(key)
        self._concurrent[key] += 1
        self.num_samples += num_samples
        try:
            yield
        finally:
            self._mean_request_s += 0.1 * (self._clock() - started_s - self._mean_request_s)
            self.num_samples -= num_samples
            self._concurrent[key] -= 1
            if not self._concurrent[key]:
                del self._concurrent[key]

    def _check(self, key: str, num_samples: int) -> None:
        limit = self._max_concurrent
        if limit is not None and self._concurrent.get(key, 0) >= limit:
            message = f"this key has {limit} requests running, its limit"
            raise _busy("rate_limit_exceeded", message, self._mean_request_s)
        if (wait_s := self._rate_limit_wait_s(key)) > 0:
            message = f"this key has sent {self._max_per_minute} requests a minute, its limit"
            raise _busy("rate_limit_exceeded", message, wait_s)
        if self.num_samples + num_samples > self._max_samples:
            message = f"the endpoint is full: {self.num_samples} samples run or wait, the limit is {self._max_samples}"
            raise _busy("overloaded", message, self._mean_request_s)

    def _rate_limit_wait_s(self, key: str) -> float:
        """Return the seconds until max_per_minute lets the key send again; 0 or less = now."""
        if self._max_per_minute is None:
            return 0.0
        interval_s = MINUTE_S / self._max_per_minute
        return self._full_again_s.get(key, 0.0) - self._clock() + interval_s - MINUTE_S

    def _count_request(self, key: str) -> None:
        """Count a request against max_per_minute, and forget the keys that have earned back everything."""
        if self._max_per_minute is not None:
            now = self._clock()
            for other in [k for k, full_s in self._full_again_s.items() if full_s < now]:
                del self._full_again_s[other]
            self._full_again_s[key] = max(now, self._full_again_s.get(key, 0.0)) + MINUTE_S / self._max_per_minute


def _busy(code: str, message: str, wait_s: float) -> ApiError:
    seconds = max(1, math.ceil(wait_s))
    return ApiError(429, code, f"{message}; try again in {seconds} s", headers={"Retry-After": str(seconds)})
