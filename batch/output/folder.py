"""The output folder of a job, on a local disk or an object store.

Its files are written as a whole and appear under their names at once.
"""

import errno
import os
import shutil
import socket
import time
import uuid
from contextlib import suppress
from copy import copy
from pathlib import Path

from pyarrow import NativeFile, fs

from moray.batch.location import locate
from moray.batch.processes.process import is_alive, start_time
from moray.batch.retry import retry_with_backoff
from moray.engine.errors import JobError, OutputError

JOB = "_job"  # other tools skip folders whose names start with an underscore
TMP = f"{JOB}/tmp"
# An object store is asked for a file's size, then for so many bytes: of one replaced in between, the end is missing.
READ_TRIES = 5
ABANDONED_S = 3600.0  # seconds; a temporary file this old has no writer any more


class OutputFolder:
    """Reads and writes the files of an output folder.

    path:        the path as the spec has it: local, s3:// or gs://
    is_private:  True writes local files that only their owner can read
    is_local:    True where files are published by a rename; elsewhere it is by one PUT
    """

    def __init__(self, path: str, *, is_private: bool = False) -> None:
        self.path = path
        self._mode = 0o600 if is_private else 0o666
        self.filesystem, self.root = locate(path)
        self.is_local = isinstance(self.filesystem, fs.LocalFileSystem)

    def subfolder(self, name: str) -> "OutputFolder":
        """Return the folder of this name in the folder."""
        found = copy(self)
        found.path, found.root = f"{self.path.rstrip('/')}/{name}", f"{self.root}/{name}"
        return found

    def names(self, inside: str = "") -> list[str]:
        """Return the sorted names of the files directly in the folder, or directly in a folder inside it.

        Raises OutputError where it cannot be read.
        """
        selector = fs.FileSelector(f"{self.root}/{inside}".rstrip("/"), allow_not_found=True)
        try:
            infos = self.filesystem.get_file_info(selector)
        except OSError as error:
            raise OutputError(self.explain(error, inside, done="read")) from None
        return sorted(info.base_name for info in infos if info.type == fs.FileType.File)

    def open(self, name: str) -> NativeFile:
        """Open a file for reading."""
        return self.filesystem.open_input_file(f"{self.root}/{name}")

    def read(self, name: str) -> bytes | None:
        """Return a file's bytes; None where there is no such file. Raises OutputError where it cannot be read."""
        try:
            for _ in range(READ_TRIES):
                with self.open(name) as file:
                    content: bytes = file.read()
                if self.is_local or len(content) == self.filesystem.get_file_info(f"{self.root}/{name}").size:
                    return content
        except FileNotFoundError:
            return None
        except OSError as error:
            raise OutputError(self.explain(error, name, done="read")) from None
        raise OutputError(f"{self.path}/{name} was replaced each of the {READ_TRIES} times it was read; try again")

    def write(self, name: str, content: bytes, *, durable: bool = True) -> None:
        """Write a whole file under its name, replacing an existing one; readers see the old file or the new one.

        durable:  True makes it survive a power cut once this returns
        """
        if not self.is_local:
            with self.filesystem.open_output_stream(f"{self.root}/{name}") as stream:
                stream.write(content)
            return
        final = Path(self.root, name)
        partial = Path(self.root, TMP, f"{final.name}~{_writer()}~{uuid.uuid4().hex}")
        for folder in (partial.parent, final.parent):
            folder.mkdir(parents=True, exist_ok=True)
        try:
            with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, self._mode), "wb") as file:
                file.write(content)
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            partial.rename(final)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        if durable:
            descriptor = os.open(final.parent, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def publish(self, name: str, content: bytes) -> None:
        """Write a file that the job cannot do without, with retries on an object store.

        Raises JobError with the reason where it cannot be written.
        """
        try:
            if self.is_local:
                self.write(name, content)
            else:
                retry_with_backoff(lambda: self.write(name, content), OSError)
        except OSError as error:
            raise JobError(self.explain(error, name)) from error

    def explain(self, error: OSError, name: str = "", done: str = "written") -> str:
        """Return one line that explains why a file, or the folder, could not be written.

        done:  what else was to be done, as a past participle
        """
        if isinstance(error, NotADirectoryError):
            return f"{self.path} is a file, or lies in one; the output of a job is a folder"
        path = f"{self.path.rstrip('/')}/{name}".rstrip("/")
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            with suppress(OSError):
                disk = shutil.disk_usage(self.root)
                free = f"its disk has {disk.free:,} of {disk.total:,} bytes free"
                return f"{path} cannot be {done}: {error.strerror}; {free}. Make room and run the job again."
        lines = str(error.strerror or error).splitlines()
        fix = (
            ""
            if self.is_local
            else ". Check the address, the credentials, and that the store can be reached from here."
        )
        return f"{path} cannot be {done}: {lines[0] if lines else type(error).__name__}{fix}"

    def remove(self, name: str) -> None:
        """Delete a file; one that does not exist is no error."""
        with suppress(FileNotFoundError):
            self.filesystem.delete_file(f"{self.root}/{name}")

    def remove_abandoned(self) -> None:
        """Delete what killed runs left in _job/tmp.

        These are the files of processes of this machine that are gone, and all files that are an hour old. Another run
        may be writing newer ones.
        """
        if self.is_local:
            for path in Path(self.root, TMP).glob("*"):
                if _has_no_writer(path.name) or time.time() - path.stat().st_mtime > ABANDONED_S:
                    path.unlink(missing_ok=True)


def _writer() -> str:
    """Return a name for this process, for its temporary files."""
    return f"{socket.gethostname()}~{os.getpid()}~{start_time(os.getpid())}"


def _has_no_writer(name: str) -> bool:
    match name.split("~"):
        case [_, host, pid, started, _]:
            return host == socket.gethostname() and pid.isdecimal() and not is_alive(int(pid), started)
        case _:
            return False
