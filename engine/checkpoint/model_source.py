"""ModelSource: the folder that model.path names, on this machine, in an object store or on the Hugging Face hub.

Only this file talks to stores and hubs; their libraries are imported when they are first needed.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Protocol

from moray.engine.checkpoint.download_cache import check_room, file_size, locked
from moray.engine.checkpoint.weight_files import StoredTensor, find_weight_files, read_headers
from moray.engine.errors import CheckpointError, NodeError, UserError
from moray.kernels.cache_root import cache_root

METADATA_SUFFIXES = (".json", ".model", ".txt", ".jinja")  # of config and tokenizer files
CHUNK_BYTES = 8 << 20  # bytes that a thread downloads at a time
THREADS = 16  # one connection to an object store gets a tenth of the bandwidth of a machine
GCS_RETRY = timedelta(seconds=30)  # pyarrow retries for 15 minutes by default, without a message

Progress = Callable[[int, int], None]


class ModelSource:
    """Reads a folder with a checkpoint in place, or downloads it.

    path: a local folder, s3://bucket/prefix, gs://[anonymous@]bucket/prefix or hf://org/name[@revision] (default: main)

    Credentials and endpoints come from the environment, in the variables of the stores' own tools (AWS_*,
    AWS_ENDPOINT_URL, GOOGLE_APPLICATION_CREDENTIALS, HF_TOKEN, HF_ENDPOINT). Every method raises CheckpointError if the
    folder does not exist, may not be read or holds no checkpoint, and NodeError if it cannot be reached or this machine
    cannot store it.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._source = _open(path)
        self.name = self._source.name

    @cached_property
    def _files(self) -> dict[str, int]:
        files = self._source.list()
        if "config.json" not in files:
            shown = ", ".join(sorted(files)[:5]) + (" ..." if len(files) > 5 else "")
            raise CheckpointError(f"{self.path} holds no checkpoint: no config.json, only {shown or 'nothing'}.")
        return files

    @property
    def revision(self) -> str | None:
        """Return the commit on the hub; None for other sources."""
        return self._source.revision()

    def files(self) -> dict[str, int]:
        """Return file name -> size in bytes, without subfolders."""
        return dict(self._files)

    def weight_files(self) -> list[str]:
        """Return the names of the files that hold the weights: one file, or those of the index."""
        return sorted(self._indexed())

    def tensors(self) -> dict[str, StoredTensor]:
        """Return the stored tensors by name, from the headers of the weight files; checks that no file is cut short."""
        return read_headers(self._indexed(), self._files, self.read, self.path.rstrip("/"))

    def _indexed(self) -> dict[str, frozenset[str] | None]:
        return find_weight_files(self._files, lambda name: self.read(name, 0, self._files[name]), self.path)

    def metadata_files(self) -> list[str]:
        """Return the names of the config and tokenizer files, and of other small text files next to them."""
        return sorted(name for name in self._files if name.endswith(METADATA_SUFFIXES) and not name.startswith("."))

    def metadata_folder(self, parent: Path) -> Path:
        """Return a local folder with config and tokenizer: that of a local model, else a new one in `parent`."""
        if "://" not in self.path:
            return Path(self.path).expanduser()
        copy = Path(mkdtemp(prefix="moray-", dir=parent))
        for name in self.metadata_files():
            (copy / name).write_bytes(self.read(name, 0, self._files[name]))
        return copy

    def read(self, name: str, offset: int, length: int) -> bytes:
        """Return `length` bytes of a file from `offset` on, fewer only at its end."""
        return self._source.read(name, offset, length)

    def download(self, cache_dir: Path | None = None, progress: Progress | None = None) -> Path:
        """Return a local folder with the weights (safetensors only), config and tokenizer; of a local model, its own.

        Files that are present with the right size are not downloaded again. Several processes may call it at once.

        cache_dir:  folder of downloads; default: ~/.cache/moray (or $XDG_CACHE_HOME/moray), or the hub's cache
        progress:   called with (bytes done, bytes in all)
        """
        names = self.metadata_files() + self.weight_files()
        return self._source.download({name: self._files[name] for name in names}, cache_dir, progress)


class _Source(Protocol):
    """Reads a model from one kind of place."""

    name: str

    def list(self) -> dict[str, int]: ...
    def revision(self) -> str | None: ...
    def read(self, name: str, offset: int, length: int) -> bytes: ...
    def download(self, files: dict[str, int], cache_dir: Path | None, progress: Progress | None) -> Path: ...


def _open(path: str) -> _Source:
    scheme, separator, rest = path.partition("://")
    if not separator:
        return _LocalFolder(Path(path).expanduser())
    rest = rest.strip("/")
    if scheme in ("s3", "gs") and rest:
        return _ObjectStore(scheme, rest)
    if scheme == "hf" and (match := re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@(.+))?", rest)):
        return _Hub(match[1], match[2] or "main")
    raise CheckpointError(
        f"model.path is {path!r}; it must be a folder, s3://bucket/prefix, gs://bucket/prefix or hf://org/name[@revision]."
    )


class _LocalFolder:
    """Reads a folder on this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = folder.resolve().name

    def list(self) -> dict[str, int]:
        try:
            return {entry.name: entry.stat().st_size for entry in os.scandir(self.folder) if entry.is_file()}
        except FileNotFoundError:
            raise CheckpointError(f"{self.folder} does not exist (looked for from {Path.cwd()}).") from None
        except NotADirectoryError:
            raise CheckpointError(f"{self.folder} is a file; model.path must name the folder it is in.") from None
        except OSError as error:
            raise CheckpointError(f"{self.folder} cannot be read: {error.strerror}.") from None

    def revision(self) -> None:
        return None

    def read(self, name: str, offset: int, length: int) -> bytes:
        try:
            with open(self.folder / name, "rb") as stream:
                stream.seek(offset)
                return stream.read(length)
        except OSError as error:
            raise CheckpointError(f"{self.folder / name} cannot be read: {error.strerror}.") from None

    def download(self, files: dict[str, int], cache_dir: Path | None, progress: Progress | None) -> Path:
        return self.folder


class _ObjectStore:
    """Reads a folder in S3 or Google Cloud Storage, with pyarrow."""

    def __init__(self, scheme: str, location: str) -> None:
        self.url = f"{scheme}://{location}"
        self.location = location.removeprefix("anonymous@")
        self.name = self.location.rpartition("/")[2]
        self._times: dict[str, Any] = {}

    @cached_property
    def _store(self) -> Any:
        from pyarrow import fs

        with self._translate_errors():
            if self.url.startswith("gs://"):
                return fs.GcsFileSystem(anonymous="anonymous@" in self.url, retry_time_limit=GCS_RETRY)
            # Of all ways to create a file system, only this one finds out the bucket's region.
            return fs.FileSystem.from_uri(f"s3://{self.location.partition('/')[0]}")[0]

    def list(self) -> dict[str, int]:
        from pyarrow import fs

        with self._translate_errors():
            infos = self._store.get_file_info(fs.FileSelector(self.location))
        infos = [info for info in infos if info.type == fs.FileType.File]
        self._times = {info.base_name: info.mtime_ns for info in infos}
        return {info.base_name: info.size for info in infos}

    def revision(self) -> None:
        return None

    def read(self, name: str, offset: int, length: int) -> bytes:
        with self._translate_errors(), self._store.open_input_file(f"{self.location}/{name}") as stream:
            return bytes(stream.read_at(length, offset))

    def download(self, files: dict[str, int], cache_dir: Path | None, progress: Progress | None) -> Path:
        # A source that has changed gets a new folder: the files that an earlier run was loaded from do not change.
        listing = json.dumps([self.url, sorted((name, files[name], self._times[name]) for name in files)])
        key = hashlib.sha256(listing.encode()).hexdigest()[:16]
        folder = (cache_dir or cache_root()) / "models" / f"{self.name}-{key}"
        with locked(folder):
            missing = {name: size for name, size in files.items() if file_size(folder / name) != size}
            check_room(folder, sum(missing.values()))
            done, total = sum(files.values()) - sum(missing.values()), sum(files.values())
            for name, size in missing.items():
                for count in self._fetch(name, size, folder / name):
                    done += count
                    if progress is not None:
                        progress(done, total)
        return folder

    def _fetch(self, name: str, size: int, path: Path) -> Iterator[int]:
        """Download a file, and yield the size of each chunk written. The file gets its name when it is complete."""
        part = path.with_name(f".{name}.part")
        with self._translate_errors():
            stream = self._store.open_input_file(f"{self.location}/{name}")
        with stream, open(part, "wb") as out, ThreadPoolExecutor(THREADS, "download") as threads:

            def copy(offset: int) -> int:
                with self._translate_errors():
                    data = stream.read_at(CHUNK_BYTES, offset)
                if stream.size() != size or len(data) != min(CHUNK_BYTES, size - offset):
                    raise CheckpointError(f"{self.url}/{name} changed while it was fetched: it had {size:,} bytes.")
                return os.pwrite(out.fileno(), data, offset)

            yield from threads.map(copy, range(0, size, CHUNK_BYTES))
            os.fsync(out.fileno())
        os.replace(part, path)

    @contextlib.contextmanager
    def _translate_errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            reason = _store_reason(str(error))
            # A ValueError means an invalid address.
            is_mistake = reason in USER_MISTAKES or isinstance(error, ValueError)
            raise (CheckpointError if is_mistake else NodeError)(
                f"{self.url}: {reason}. The store's client reports: {error}"
            ) from None


# The reason that the user is given -> the pattern of the store client's message; the first match counts.
USER_MISTAKES = {
    "it does not exist, or is empty": r"No such file or directory",
    "there is no such bucket": r"NO_SUCH_BUCKET|bucket does not exist",
    "no credentials; set GOOGLE_APPLICATION_CREDENTIALS (or for a public bucket gs://anonymous@bucket/...)": "OAuth2",
    "no permission; check the credentials in the environment": r"_DENIED|HTTP status 40[13]|UNAUTHENTICATED",
}
STORE_REASONS = USER_MISTAKES | {
    "it cannot be reached; check the network and the endpoint": r"NETWORK_CONNECTION|curlCode|UNAVAILABLE|timed? ?out",
}


def _store_reason(text: str) -> str:
    fitting = (reason for reason, signs in STORE_REASONS.items() if re.search(signs, text))
    return next(fitting, "it cannot be read")


class _Hub:
    """Reads a model repository on the Hugging Face hub, or on the hub that HF_ENDPOINT names."""

    def __init__(self, repo: str, revision: str) -> None:
        self.repo = repo
        self.requested_revision = revision
        self.name = repo.rpartition("/")[2]

    @cached_property
    def _info(self) -> Any:
        from huggingface_hub import HfApi

        with self._translate_errors():
            return HfApi().model_info(self.repo, revision=self.requested_revision, files_metadata=True)

    def list(self) -> dict[str, int]:
        return {file.rfilename: file.size for file in self._info.siblings if "/" not in file.rfilename}

    def revision(self) -> str:
        return str(self._info.sha)

    def read(self, name: str, offset: int, length: int) -> bytes:
        from huggingface_hub import HfFileSystem

        with self._translate_errors():
            path = f"{self.repo}@{self.revision()}/{name}"
            return bytes(HfFileSystem().cat_file(path, start=offset, end=offset + length))

    def download(self, files: dict[str, int], cache_dir: Path | None, progress: Progress | None) -> Path:
        """Download into the hub's own cache (HF_HOME), where other tools find the model and may have put it already."""
        from huggingface_hub import hf_hub_download

        def fetch(name: str) -> tuple[str, Path]:
            return name, Path(hf_hub_download(self.repo, name, revision=self.revision(), cache_dir=cache_dir))

        done, folder = 0, Path()
        with self._translate_errors(), ThreadPoolExecutor(8, "download") as threads:
            for name, path in threads.map(fetch, files):
                if file_size(path) != files[name]:
                    raise NodeError(f"{path} has {file_size(path)} bytes, must have {files[name]:,}; remove it.")
                done, folder = done + files[name], path.parent
                if progress is not None:
                    progress(done, sum(files.values()))
        return folder

    @contextlib.contextmanager
    def _translate_errors(self) -> Iterator[None]:
        from huggingface_hub import errors

        where = f"hf://{self.repo}@{self.requested_revision}"
        try:
            yield
        except UserError:
            raise
        except errors.GatedRepoError:
            raise CheckpointError(f"{where} is gated; accept its terms on its page and set HF_TOKEN.") from None
        except errors.RepositoryNotFoundError:
            raise CheckpointError(f"{where} does not exist, or is private: then set HF_TOKEN.") from None
        except errors.RevisionNotFoundError:
            raise CheckpointError(f"{where}: the repository has no such revision.") from None
        except Exception as error:  # a lost connection's type depends on the client's HTTP library
            raise NodeError(
                f"{where} cannot be read from the hub; check the network and HF_ENDPOINT, or give a local folder. "
                f"The hub's client reports: {type(error).__name__}: {error}"
            ) from None
