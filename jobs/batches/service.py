"""StoreService: the files and batches of the API over a BatchStore. Each replica of the endpoint has one.

It starts nothing: the coordinator finds new batches in the store.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

from moray.batch.units import size
from moray.engine.errors import JobError, OutputError
from moray.jobs.batches.ids import BATCH, FILE, is_id, new_id
from moray.jobs.batches.record import BatchRecord, BatchStatus
from moray.jobs.batches.store import BatchStore
from moray.jobs.batches.stored_file import ContentWriter, StoredFile
from moray.serve.args import EndpointArgs
from moray.serve.batches import NewBatch, Page
from moray.serve.errors import ApiError

DAY_S = 24 * 3600
THREADS = 16  # that read records at once, since most of the time is spent waiting for the store
BLOCK_BYTES = 1 << 20
CANCELLABLE = (BatchStatus.VALIDATING, BatchStatus.IN_PROGRESS, BatchStatus.CANCELLING)

T = TypeVar("T")


def open_service(args: EndpointArgs) -> "StoreService":
    """Return the service of an endpoint that has a store."""
    assert args.batch_store is not None
    return StoreService(BatchStore(args.batch_store), args)


class StoreService:
    """Implements moray.serve.batches.BatchService; the limits are those of the endpoint's arguments."""

    def __init__(self, store: BatchStore, args: EndpointArgs, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._args = args
        self._clock = clock
        self._pool = ThreadPoolExecutor(THREADS, "batches")

    # Files.

    async def new_upload(self, owner: str) -> "StoreUpload":
        limit = self._args.max_store_bytes
        if limit is not None and (used := await self._call(self._store.num_bytes)) >= limit:
            message = f"the store of files and batches has {size(used)}, its limit is {size(limit)}; delete files"
            raise ApiError(507, "store_full", message, headers=NO_RETRY)
        file_id = new_id(FILE, self._clock())
        writer = await self._call(lambda: self._store.create_content(owner, file_id))
        return StoreUpload(self, owner, file_id, writer)

    async def add_file(
        self, owner: str, file_id: str, content: tuple[int, str], filename: str, expires_s: int | None
    ) -> dict[str, Any]:
        """Make a file of an upload, whose content has this size and SHA-256."""
        now = int(self._clock())
        kept_s = expires_s or int(self._args.file_retention_days * DAY_S)
        file = StoredFile(file_id, content[0], now, now + kept_s, filename, "batch", content[1])
        await self._call(lambda: self._store.add_file(owner, file))
        return file.to_object()

    async def files(self, owner: str, page: Page, purpose: str | None) -> dict[str, Any]:
        ids = await self._call(lambda: self._store.file_ids(owner))

        def read(file_id: str) -> dict[str, Any] | None:
            file = self._find_file(owner, file_id)
            return None if file is None or purpose not in (None, file.purpose) else file.to_object()

        return await self._call(lambda: _list(ids, page, read))

    async def file(self, owner: str, file_id: str) -> dict[str, Any]:
        return (await self._file(owner, file_id)).to_object()

    async def content(self, owner: str, file_id: str) -> tuple[int, AsyncIterator[bytes]]:
        file = await self._file(owner, file_id)
        blocks = self._store.read_content(owner, file_id)
        first = await self._call(lambda: next(blocks, b""))  # an error of the store has a status then

        async def read() -> AsyncIterator[bytes]:
            block = first
            while block:
                yield block
                block = await self._call(lambda: next(blocks, b""))

        return file.bytes, read()

    async def delete_file(self, owner: str, file_id: str) -> dict[str, Any]:
        await self._file(owner, file_id)
        await self._call(lambda: self._store.remove_file(owner, file_id))
        return {"id": file_id, "object": "file", "deleted": True}

    async def _file(self, owner: str, file_id: str) -> StoredFile:
        found = await self._call(lambda: self._find_file(owner, file_id))
        if found is None:
            raise ApiError(404, "not_found", f"No such File object: {file_id}", param="id")
        return found

    def _find_file(self, owner: str, file_id: str) -> StoredFile | None:
        file = self._store.file(owner, file_id) if is_id(file_id, FILE) else None
        return None if file is None or file.expires_at <= self._clock() else file

    # Batches.

    async def create(self, owner: str, batch: NewBatch) -> dict[str, Any]:
        file = await self._call(lambda: self._find_file(owner, batch.input_file_id))
        if file is None:
            message = f"input_file_id: there is no file {batch.input_file_id}"
            raise ApiError(404, "not_found", message, param="input_file_id")
        if file.purpose != "batch":
            message = f"input_file_id: the file's purpose is {file.purpose}; it must be batch"
            raise ApiError(400, "invalid_purpose", message, param="input_file_id")
        now = self._clock()
        record = BatchRecord(
            new_id(BATCH, now),
            owner,
            batch.endpoint,
            batch.input_file_id,
            batch.completion_window,
            batch.window_s,
            int(now),
            metadata=batch.metadata,
            output_expires_s=batch.output_expires_s,
        )

        def add() -> None:
            self._store.copy_input(owner, batch.input_file_id, record.id)
            self._store.add_batch(record)

        await self._call(add)
        return record.to_object()

    async def batch(self, owner: str, batch_id: str) -> dict[str, Any]:
        return (await self._batch(owner, batch_id)).to_object()

    async def batches(self, owner: str, page: Page) -> dict[str, Any]:
        ids = await self._call(lambda: self._store.batch_ids(owner))

        def read(batch_id: str) -> dict[str, Any] | None:
            found = self._find_batch(owner, batch_id)
            return None if found is None else found.to_object()

        return await self._call(lambda: _list(ids, page, read))

    async def cancel(self, owner: str, batch_id: str) -> dict[str, Any]:
        batch = await self._batch(owner, batch_id)
        if batch.status in CANCELLABLE:
            if batch.cancelling_at is None:
                await self._call(lambda: self._store.request_cancel(batch, int(self._clock())))
            batch = await self._batch(owner, batch_id)  # it may have come to its end meanwhile
        if batch.status not in CANCELLABLE:
            await self._call(lambda: self._store.withdraw_cancel(batch))
            message = f"the batch is {batch.status}: only one that is validating or in progress can be cancelled"
            raise ApiError(409, "invalid_state", message, headers=NO_RETRY)
        return batch.to_object()

    async def open_counts(self) -> Mapping[str, int]:
        counts = Counter({str(state): 0 for state in BatchStatus if not state.is_final})
        counts["requests"] = 0
        for batch in await self._call(self._store.open_batches):
            counts[str(batch.status)] += 1
            counts["requests"] += batch.total - batch.completed - batch.failed
        return counts

    async def _batch(self, owner: str, batch_id: str) -> BatchRecord:
        found = await self._call(lambda: self._find_batch(owner, batch_id))
        if found is None:
            raise ApiError(404, "not_found", f"No such Batch object: {batch_id}", param="id")
        return found

    def _find_batch(self, owner: str, batch_id: str) -> BatchRecord | None:
        """Return the batch, cancelling as soon as its owner asked for that."""
        batch = self._store.batch(owner, batch_id) if is_id(batch_id, BATCH) else None
        if batch is not None and batch.status in (BatchStatus.VALIDATING, BatchStatus.IN_PROGRESS):
            asked_at = self._store.cancel_requested_at(batch)
            if asked_at is not None:
                batch = batch.cancel(asked_at)
        return batch

    async def _call(self, function: Callable[[], T]) -> T:
        """Call a function of the store in a thread. Raises ApiError where the store fails."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, function)
        except (OSError, OutputError, JobError):
            message = "the store of files and batches cannot be read or written; try again"
            raise ApiError(503, "store_unavailable", message, headers={"Retry-After": "5"}) from None


class StoreUpload:
    """Implements moray.serve.batches.FileUpload. Data is written in blocks, in a thread."""

    def __init__(self, service: StoreService, owner: str, file_id: str, writer: ContentWriter) -> None:
        self._service = service
        self._owner = owner
        self._id = file_id
        self._writer = writer
        self._buffer = bytearray()

    async def write(self, data: bytes) -> None:
        self._buffer += data
        limit = self._service._args.max_file_bytes
        if self._writer.num_bytes + len(self._buffer) > limit:
            raise ApiError(413, "file_too_large", f"the file is larger than {limit:,} bytes, this endpoint's limit")
        if len(self._buffer) >= BLOCK_BYTES:
            await self._flush()

    async def finish(self, filename: str, expires_s: int | None) -> dict[str, Any]:
        await self._flush()
        digest = await self._service._call(self._writer.close)
        content = self._writer.num_bytes, digest
        return await self._service.add_file(self._owner, self._id, content, filename, expires_s)

    async def discard(self) -> None:
        def remove() -> None:
            with suppress(OSError):
                self._writer.close(durable=False)
            self._service._store.remove_content(self._owner, self._id)

        await self._service._call(remove)

    async def _flush(self) -> None:
        block, self._buffer = bytes(self._buffer), bytearray()
        await self._service._call(lambda: self._writer.write(block))


# The openai package tries a 409 or a 5xx again by itself, unless the answer says that this is no use.
NO_RETRY = {"x-should-retry": "false"}


def _list(ids: Sequence[str], page: Page, read: Callable[[str], dict[str, Any] | None]) -> dict[str, Any]:
    """Return a page of the objects that `read` returns; None where there is none."""
    ordered: Iterator[str] = iter(ids if page.ascending else reversed(ids))
    if page.after is not None:
        after = page.after
        ordered = (one for one in ordered if (one > after if page.ascending else one < after))
    found: list[dict[str, Any]] = []
    with ThreadPoolExecutor(THREADS) as pool:
        while len(found) <= page.limit:
            names = [name for _, name in zip(range(page.limit + 1 - len(found)), ordered, strict=False)]
            if not names:
                break
            found += [one for one in pool.map(read, names) if one is not None]
    data = found[: page.limit]
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": len(found) > page.limit,
    }
