"""Data sets on the Hugging Face hub as a filesystem: hf://datasets/org/name[@revision]/path, at one commit."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import pyarrow as pa
from pyarrow import fs

from moray.batch.location import locate
from moray.engine.errors import InputError, NodeError

_SCHEME = "hf://"
_DATASETS = "datasets/"


def locate_input(path: str) -> tuple[fs.FileSystem, str]:
    """Return the filesystem of a path of the input, and the path in it.

    A path on the hub is that of the commit which its revision names now, so that all processes read the same files.

    Raises UserError where there is no such filesystem, data set or revision.
    """
    if not path.startswith(_SCHEME):
        return locate(path)
    inner = path.removeprefix(_SCHEME)
    if not inner.startswith(_DATASETS) or inner.count("/") < 2:
        raise InputError(f"{path}: must be hf://datasets/org/name, with a folder, file or glob after it")
    filesystem = fs.PyFileSystem(_HubHandler(_open_hub(os.environ.get("HF_ENDPOINT"))))
    return filesystem, _pin(path, inner, os.environ.get("HF_ENDPOINT"))


def _open_hub(endpoint: str | None) -> Any:
    from huggingface_hub import HfFileSystem  # takes a second to import

    return HfFileSystem(endpoint=endpoint)


@lru_cache(maxsize=256)
def _pin(path: str, inner: str, endpoint: str | None) -> str:
    """Return the path with the commit in place of its revision."""
    from huggingface_hub import HfApi, errors

    try:
        found = _open_hub(endpoint).resolve_path(inner)
        commit = HfApi(endpoint=endpoint).dataset_info(found.repo_id, revision=found.revision).sha
    except Exception as error:  # a lost connection's type depends on the client's HTTP library
        causes = (error, error.__cause__)
        if any(isinstance(cause, errors.GatedRepoError) for cause in causes):
            raise InputError(f"{path}: is gated; accept its terms on its page and set HF_TOKEN") from None
        missing = (errors.RevisionNotFoundError, errors.RepositoryNotFoundError, FileNotFoundError)
        if any(isinstance(cause, missing) for cause in causes):
            raise InputError(f"{path}: no such data set or revision, or it is private: then set HF_TOKEN") from None
        raise NodeError(
            f"{path}: cannot be read from the hub; check the network and HF_ENDPOINT. "
            f"The hub's client reports: {type(error).__name__}: {error}"
        ) from None
    return f"{_DATASETS}{found.repo_id}@{commit}/{found.path_in_repo}".rstrip("/")


class _HubHandler(fs.FSSpecHandler):  # type: ignore[misc]  # pyarrow has no types
    """Gives Arrow the hub's files, with the errors that stores have: the hub's client raises those of its HTTP
    library."""

    def get_file_info(self, paths: Any) -> Any:
        with _as_os_error():
            return super().get_file_info(paths)

    def get_file_info_selector(self, selector: Any) -> Any:
        with _as_os_error():
            return super().get_file_info_selector(selector)

    def open_input_file(self, path: str) -> pa.PythonFile:
        with _as_os_error():
            return pa.PythonFile(_HubFile(self.fs.open(path, mode="rb")), mode="r")

    open_input_stream = open_input_file


class _HubFile:
    """Reads an open file of the hub."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        return bytes(self._call(self._file.read, size))

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._call(self._file.seek, offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    @property
    def closed(self) -> bool:
        return bool(self._file.closed)

    def close(self) -> None:
        self._file.close()

    def _call(self, call: Callable[..., Any], *arguments: Any) -> Any:
        with _as_os_error():
            return call(*arguments)


@contextmanager
def _as_os_error() -> Iterator[None]:
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"the hub's client reports: {type(error).__name__}: {error}") from error
