"""The output folder: whole files that appear at once under their names, on a local disk or an object store."""

import os
import time
import uuid
from contextlib import suppress
from pathlib import Path

from pyarrow import NativeFile, fs

from batch.location import locate

JOB = "_job"  # what other tools do not read
TMP = f"{JOB}/tmp"
ABANDONED_S = 3600.0  # a temporary file this old has no writer any more


class OutputFolder:
    """
    path:      as the spec has it: local, s3:// or gs://
    is_local:  files are published by rename; elsewhere by one PUT
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.filesystem, self.root = locate(path)
        self.is_local = isinstance(self.filesystem, fs.LocalFileSystem)

    def names(self) -> list[str]:
        """Files that lie directly in the folder, sorted."""
        infos = self.filesystem.get_file_info(fs.FileSelector(self.root, allow_not_found=True))
        return sorted(info.base_name for info in infos if info.type == fs.FileType.File)

    def open(self, name: str) -> NativeFile:
        return self.filesystem.open_input_file(f"{self.root}/{name}")

    def read(self, name: str) -> bytes | None:
        """The file's bytes, None where there is no such file."""
        try:
            with self.open(name) as file:
                content: bytes = file.read()
                return content
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes, *, durable: bool = True) -> None:
        """Put a whole file under its name, replacing one that is there; readers see the old one or the new one.

        durable: it survives a power cut once this returns
        """
        if not self.is_local:
            with self.filesystem.open_output_stream(f"{self.root}/{name}") as stream:
                stream.write(content)
            return
        final = Path(self.root, name)
        partial = Path(self.root, TMP, f"{final.name}.{uuid.uuid4().hex}")
        for folder in (partial.parent, final.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        partial.rename(final)
        if durable:
            descriptor = os.open(final.parent, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def remove(self, name: str) -> None:
        """Delete a file; one that is not there is no mistake."""
        with suppress(FileNotFoundError):
            self.filesystem.delete_file(f"{self.root}/{name}")

    def remove_abandoned(self) -> None:
        """Delete what killed runs left in _job/tmp. Files of an hour ago: another run may be writing newer ones."""
        if self.is_local:
            for path in Path(self.root, TMP).glob("*"):
                if time.time() - path.stat().st_mtime > ABANDONED_S:
                    path.unlink(missing_ok=True)
