"""BatchStore: the files, records and job folders of batches, in a local folder or a bucket.

    files/OWNER/FILE.jsonl, FILE.json        content, and what is known of it; a content without the latter is no file
    batches/OWNER/BATCH.json, BATCH.cancel   the record, and the mark that its owner asked for its end
    jobs/BATCH/                              the job folder: input.jsonl until the end, parts, plan, events
    open/OWNER.BATCH                         a mark for each batch that is not in a final state

OWNER is a digest of the name of the key, so nobody can name another's folder. The store is the truth: what writes into
it holds nothing that it could not read from it again.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

from pyarrow import fs

from moray.batch.output.folder import OutputFolder
from moray.engine.errors import OutputError, UserError
from moray.jobs.batches.record import BatchRecord
from moray.jobs.batches.stored_file import ContentWriter, StoredFile

INPUT = "input.jsonl"  # in a job folder
BLOCK_BYTES = 1 << 20


class BatchStore:
    """Reads and writes the store. Every method may wait for a disk or the network: call it in a thread.

    path:  local folder, s3:// or gs://
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.folder = OutputFolder(path, is_private=True)

    def prepare(self) -> None:
        """Make the folders of the store. Raises UserError where it cannot be written."""
        try:
            if self.folder.is_local:
                root = Path(self.folder.root)
                root.mkdir(parents=True, exist_ok=True, mode=0o700)
                for name in ("files", "batches", "jobs", "open", "_job"):
                    (root / name).mkdir(exist_ok=True, mode=0o700)
            self.folder.write("_job/store.json", b'{"version": 1}')
        except OSError as error:
            raise UserError(f"batch_store: {self.folder.explain(error)}") from None

    # Files.

    def create_content(self, owner: str, file_id: str) -> ContentWriter:
        """Begin to write the content of a file."""
        return ContentWriter(self.folder, _content(owner, file_id))

    def remove_content(self, owner: str, file_id: str) -> None:
        """Remove a content that did not become a file."""
        self.folder.remove(_content(owner, file_id))

    def add_file(self, owner: str, file: StoredFile) -> None:
        """Make a file of a content that is complete."""
        self.folder.publish(f"files/{_place(owner)}/{file.id}.json", json.dumps(asdict(file)).encode())

    def file(self, owner: str, file_id: str) -> StoredFile | None:
        """Return what is known of a file; None where its owner has no such file."""
        return self.read_at(_place(owner), file_id)

    def file_ids(self, owner: str) -> list[str]:
        """Return the ids of an owner's files, in the order of their creation."""
        return _ids(self.folder.names(f"files/{_place(owner)}"))

    def read_content(self, owner: str, file_id: str) -> Iterator[bytes]:
        """Yield the content of a file in blocks."""
        with self.folder.open(_content(owner, file_id)) as file:
            while block := file.read(BLOCK_BYTES):
                yield block

    def remove_file(self, owner: str, file_id: str) -> None:
        """Remove a file; first what makes it one."""
        self.folder.remove(f"files/{_place(owner)}/{file_id}.json")
        self.folder.remove(_content(owner, file_id))

    def num_bytes(self) -> int:
        """Return the bytes of everything in the store."""
        selector = fs.FileSelector(self.folder.root, allow_not_found=True, recursive=True)
        return sum(info.size or 0 for info in self.folder.filesystem.get_file_info(selector))

    # Batches.

    def job(self, batch_id: str) -> OutputFolder:
        """Return the job folder of a batch."""
        return self.folder.subfolder(f"jobs/{batch_id}")

    def copy_input(self, owner: str, file_id: str, batch_id: str) -> None:
        """Give the batch its own input, which stays when the file is deleted. Raises OSError."""
        source, target = f"{self.folder.root}/{_content(owner, file_id)}", f"{self.job(batch_id).root}/{INPUT}"
        if not self.folder.is_local:
            self.folder.filesystem.copy_file(source, target)
            return
        Path(target).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            os.link(source, target)
        except OSError:  # a file system without hard links
            shutil.copyfile(source, target)
            os.chmod(target, 0o600)

    def add_batch(self, batch: BatchRecord) -> None:
        """Write a new batch, which is open from then on."""
        self.folder.publish(_mark(batch.owner, batch.id), b"")
        self.write_batch(batch)

    def write_batch(self, batch: BatchRecord) -> None:
        """Replace the record of a batch. Raises JobError where it cannot be written."""
        self.folder.publish(f"batches/{_place(batch.owner)}/{batch.id}.json", batch.to_json().encode())

    def batch(self, owner: str, batch_id: str) -> BatchRecord | None:
        """Return the record of a batch; None where its owner has no such batch."""
        return self.read_batch_at(_place(owner), batch_id)

    def batch_ids(self, owner: str) -> list[str]:
        """Return the ids of an owner's batches, in the order of their creation."""
        return _ids(self.folder.names(f"batches/{_place(owner)}"))

    def request_cancel(self, batch: BatchRecord, now: int) -> None:
        """Mark that the owner of a batch asks for its end."""
        self.folder.publish(f"batches/{_place(batch.owner)}/{batch.id}.cancel", str(now).encode())

    def withdraw_cancel(self, batch: BatchRecord) -> None:
        """Remove this mark."""
        self.folder.remove(f"batches/{_place(batch.owner)}/{batch.id}.cancel")

    def cancel_requested_at(self, batch: BatchRecord) -> int | None:
        """Return when the owner of a batch asked for its end; None where nobody did."""
        content = self.folder.read(f"batches/{_place(batch.owner)}/{batch.id}.cancel")
        return None if content is None else int(content)

    def open_batches(self) -> list[BatchRecord]:
        """Return the batches that are not in a final state, oldest first."""
        found = []
        for place, batch_id in self.marks():
            batch = self.read_batch_at(place, batch_id)
            if batch is not None:  # one that is being added has no record yet
                found.append(batch)
        return sorted(found, key=lambda batch: batch.id)

    def close_batch(self, batch: BatchRecord) -> None:
        """Remove what only an open batch needs. Its record, which is final, was written before."""
        self.job(batch.id).remove(INPUT)
        self.withdraw_cancel(batch)
        self.folder.remove(_mark(batch.owner, batch.id))

    def remove_batch(self, place: str, batch_id: str) -> None:
        """Remove the record and the job folder of a batch that is over."""
        with suppress(FileNotFoundError):
            self.folder.filesystem.delete_dir(f"{self.folder.root}/jobs/{batch_id}")
        self.folder.remove(f"batches/{place}/{batch_id}.json")
        self.folder.remove(f"open/{place}.{batch_id}")

    def _read_json(self, name: str) -> Any:
        """Return the JSON value of a file; None where there is no such file. Raises OutputError."""
        content = self.folder.read(name)
        try:
            return None if content is None else json.loads(content)
        except ValueError:
            raise OutputError(f"{self.path}/{name} is damaged: it is not JSON") from None

    # For the sweep.

    def marks(self) -> Iterator[tuple[str, str]]:
        """Yield place of the owner and id of every open batch, also of those that are just being added."""
        for name in self.folder.names("open"):
            place, _, batch_id = name.partition(".")
            yield place, batch_id

    def all_records(self, kind: str) -> Iterator[tuple[str, str]]:
        """Yield place of the owner and id of every record. kind: files or batches."""
        for place in self._folders(kind):
            yield from ((place, name) for name in _ids(self.folder.names(f"{kind}/{place}")))

    def read_at(self, place: str, file_id: str) -> StoredFile | None:
        """Return a file by the place of its owner."""
        value = self._read_json(f"files/{place}/{file_id}.json")
        return None if value is None else StoredFile(**value)

    def read_batch_at(self, place: str, batch_id: str) -> BatchRecord | None:
        """Return a batch by the place of its owner."""
        value = self._read_json(f"batches/{place}/{batch_id}.json")
        return None if value is None else BatchRecord.from_object(value)

    def contents(self) -> Iterator[tuple[str, str]]:
        """Yield place of the owner and id of every content, also those that are no files."""
        for place in self._folders("files"):
            names = self.folder.names(f"files/{place}")
            yield from ((place, name.removesuffix(".jsonl")) for name in names if name.endswith(".jsonl"))

    def remove_file_at(self, place: str, file_id: str) -> None:
        """Remove a file, or a content that is none, by the place of its owner."""
        self.folder.remove(f"files/{place}/{file_id}.json")
        self.folder.remove(f"files/{place}/{file_id}.jsonl")

    def _folders(self, kind: str) -> list[str]:
        selector = fs.FileSelector(f"{self.folder.root}/{kind}", allow_not_found=True)
        infos = self.folder.filesystem.get_file_info(selector)
        return sorted(info.base_name for info in infos if info.type == fs.FileType.Directory)


def _place(owner: str) -> str:
    return sha256(owner.encode()).hexdigest()[:16]


def _content(owner: str, file_id: str) -> str:
    return f"files/{_place(owner)}/{file_id}.jsonl"


def _mark(owner: str, batch_id: str) -> str:
    return f"open/{_place(owner)}.{batch_id}"


def _ids(names: list[str]) -> list[str]:
    return [name.removesuffix(".json") for name in names if name.endswith(".json")]
