"""StoredFile: what is known of a file of the API; ContentWriter: writes its content."""

import os
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from moray.batch.output.folder import OutputFolder


@dataclass(frozen=True)
class StoredFile:
    """Describes a file; times are seconds since 1970.

    purpose:  batch (an input) or batch_output
    sha256:   of its content
    """

    id: str
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    sha256: str

    def to_object(self) -> dict[str, Any]:
        """Return the JSON object that the API sends."""
        values = asdict(self)
        del values["sha256"]
        return values | {"object": "file", "status": "processed", "status_details": None}


class ContentWriter:
    """Writes the content of a file in pieces. It becomes a file only when BatchStore.add_file is called.

    num_bytes:  that were written
    """

    def __init__(self, folder: OutputFolder, name: str) -> None:
        path = f"{folder.root}/{name}"
        self._file: Any
        if folder.is_local:
            Path(path).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb")
        else:
            self._file = folder.filesystem.open_output_stream(path)
        self._is_local = folder.is_local
        self._digest = sha256()
        self.num_bytes = 0

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.num_bytes += len(data)

    def close(self, *, durable: bool = True) -> str:
        """Close the content and return its SHA-256."""
        if self._is_local and durable:
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()
        return self._digest.hexdigest()
