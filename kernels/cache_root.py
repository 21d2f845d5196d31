"""Find the folder of moray's caches."""

import os
from pathlib import Path


def cache_root() -> Path:
    """Return the folder of moray's caches."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "moray"
