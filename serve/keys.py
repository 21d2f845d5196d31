"""Keys: the bearer keys that clients of the endpoint must send."""

import hmac
import os
import time
from collections.abc import Callable, Iterable
from hashlib import sha256
from pathlib import Path

ENVIRONMENT = "MORAY_API_KEYS"  # environment variable with keys, separated by commas
CHECK_EVERY_S = 1.0  # shortest time between two looks at whether the file has changed


class Keys:
    """Holds the keys of a file (one a line, # begins a comment) and of an environment variable (separated by commas).

    A key may be followed by a space and a name. Keys of one name have the same files and batches, so one can replace
    the other. The file is read again when it changes; while it cannot be read, the keys read last stay valid. Raises
    OSError where the file cannot be read at the start.
    """

    def __init__(self, file: str | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._file = None if file is None else Path(file)
        self._clock = clock
        self._from_environment = _named(os.environ.get(ENVIRONMENT, "").split(","))
        self._checked_s = clock()
        self._version = self._find_version()
        self._names = self._read()

    @property
    def are_configured(self) -> bool:
        """Return whether clients need a key. With a file they do, even while it has no keys."""
        return self._file is not None or bool(self._from_environment)

    def find(self, authorization: str | None) -> str | None:
        """Return a name, safe to log, of the key in an Authorization header; None where the key is not valid.

        It is the key's own name, or else eight digits of its hash.
        """
        self._reload()
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer":
            return None
        digest = _digest(key.strip())
        # Every key is compared, in constant time: how long it takes reveals nothing about the keys.
        found = [name for known, name in self._names.items() if hmac.compare_digest(digest, known)]
        return found[0] if found else None

    def _reload(self) -> None:
        now = self._clock()
        if self._file is None or now - self._checked_s < CHECK_EVERY_S:
            return
        self._checked_s = now
        try:
            version = self._find_version()
            if version != self._version:
                self._names, self._version = self._read(), version
        except OSError:
            return

    def _find_version(self) -> tuple[int, int, int] | None:
        if self._file is None:
            return None
        status = self._file.stat()
        return status.st_mtime_ns, status.st_size, status.st_ino

    def _read(self) -> dict[bytes, str]:
        if self._file is None:
            return self._from_environment
        lines = (line.partition("#")[0] for line in self._file.read_text().splitlines())
        return self._from_environment | _named(lines)


def _named(lines: Iterable[str]) -> dict[bytes, str]:
    """Return the name of each key by its digest."""
    found = {}
    for key, *name in (line.split(maxsplit=1) for line in lines if line.strip()):
        digest = _digest(key)
        found[digest] = name[0].strip() if name else digest.hex()[:8]
    return found


def _digest(key: str) -> bytes:
    return sha256(key.encode()).digest()
