"""FileAccess opens the files of an input for readers, and finds those that are not the ones that were planned."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pyarrow as pa
from pyarrow import fs

from moray.batch.retry import StoreError
from moray.engine.errors import InputError, JobError

Version = tuple[int, int]  # size and modification time


class FileAccess:
    """Finds and opens the files below a root.

    identities:  file -> its identity when the job was planned
    """

    def __init__(self, filesystem: fs.FileSystem, root: str) -> None:
        self.filesystem = filesystem
        self.identities: Mapping[str, str] = {}
        self._root = root
        self._held: tuple[str, Version] | None = None
        self._is_local = isinstance(filesystem, fs.LocalFileSystem)

    def path(self, file: str) -> str:
        """Return the path in the filesystem of a file given relative to the root."""
        return f"{self._root.rstrip('/')}/{file}"

    def version(self, file: str) -> Version:
        """Return the version of a file. Raises InputError where it is gone, StoreError where it cannot be reached."""
        if self._held is not None and self._held[0] == file:
            return self._held[1]
        try:
            info = self.filesystem.get_file_info(self.path(file))
        except OSError as error:
            raise self.unreachable(file, error) from None
        if info.type != fs.FileType.File:
            raise InputError(f"{file}: is not there any more. Put it back and run the job again.")
        return info.size, info.mtime_ns or 0

    @contextmanager
    def holding_version(self, file: str) -> Iterator[None]:
        """Ask for the version of a file once, for all that is read of it in this context."""
        self._held = file, self.version(file)
        try:
            yield
        finally:
            self._held = None

    def check(self, file: str, identity: str) -> None:
        """Raise ValueError where a file does not have the identity that it had when the job was planned."""
        if self.identities.get(file) not in (None, identity):
            raise ValueError("it has been changed since the job was planned")

    @contextmanager
    def opening(self, file: str) -> Iterator[None]:
        """Translate the errors that come while a file is opened."""
        try:
            yield
        except (ValueError, pa.ArrowException) as error:
            raise self.changed(file, str(error)) from None
        except OSError as error:
            raise self.unreachable(file, error) from None

    @contextmanager
    def reading(self, file: str) -> Iterator[None]:
        """Translate the errors that come while a file is read whose rows cannot be bad by themselves."""
        try:
            yield
        except ValueError as error:
            raise self.changed(file, str(error)) from None
        except OSError as error:
            raise self.unreachable(file, error) from None

    def changed(self, file: str, how: str) -> InputError:
        """Return the error of a file that is not the planned one."""
        advice = "Put the file back that was planned, or give the new one an output folder of its own."
        return InputError(f"{file}: is not the file that was planned: {how}. {advice}")

    def unreachable(self, file: str, error: OSError) -> JobError:
        """Return the error of a file that cannot be read, which is not the fault of its rows."""
        message = f"{file}: cannot be read: {str(error).splitlines()[0]}. Run the job again when it can."
        return JobError(message) if self._is_local else StoreError(message)

    def check_reachable(self, file: str) -> None:
        """Raise StoreError where an object store does not return the file's bytes: then its rows are not bad."""
        if self._is_local:
            return
        try:
            with self.filesystem.open_input_file(self.path(file)) as source:
                source.read()
        except OSError as error:
            raise self.unreachable(file, error) from None
