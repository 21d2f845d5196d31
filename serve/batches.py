"""What the routes of the Batch API need of whoever runs batches, and what that needs of a replica.

The package jobs has both: this module keeps the endpoint free of stores and job folders.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol


class LineAnswer(NamedTuple):
    """Holds the answer to one line of a batch.

    status:      of HTTP, as the route would answer
    request_id:  for logs
    body:        JSON text of the answer, or of its error
    num_prompt_tokens, num_generated_tokens:  None where it failed
    seconds:     from its start to its end
    """

    status: int
    request_id: str
    body: str
    num_prompt_tokens: int | None
    num_generated_tokens: int | None
    seconds: float


class Answered(NamedTuple):
    """Holds the answers to some lines, in their order, and who gave them.

    replica:   a name of it
    max_rows:  lines that it should have at a time, so that its engine is full
    """

    replica: str
    max_rows: int
    answers: Sequence[LineAnswer]


class ReplicaFailedError(Exception):
    """Means that the engine of a replica failed while it answered lines."""


class ReplicaClosingError(Exception):
    """Means that a replica answers no more, because it is being stopped."""


@dataclass(frozen=True)
class NewBatch:
    """Describes a batch that a client asks for.

    window_s:          seconds that it may take, as `completion_window` says
    output_expires_s:  seconds for which its output files are kept; None = as all files
    """

    input_file_id: str
    endpoint: str
    completion_window: str
    window_s: int
    metadata: Mapping[str, str] | None = None
    output_expires_s: int | None = None


@dataclass(frozen=True)
class Page:
    """States which part of a list is wanted.

    after:      the id before its first one; None = from the start
    ascending:  oldest first
    """

    limit: int
    after: str | None = None
    ascending: bool = False


class FileUpload(Protocol):
    """Receives the content of a new file."""

    async def write(self, data: bytes) -> None:
        """Add to the content. Raises ApiError where it becomes too large."""

    async def finish(self, filename: str, expires_s: int | None) -> dict[str, Any]:
        """Make a file of the content and return its object.

        expires_s:  seconds for which it is kept; None = as all files
        """

    async def discard(self) -> None:
        """Forget the content."""


class BatchService(Protocol):
    """Keeps files and batches. An owner has only their own: for others' ids, methods raise ApiError with 404."""

    async def new_upload(self, owner: str) -> FileUpload:
        """Begin a new file. Raises ApiError where the store is full."""

    async def files(self, owner: str, page: Page, purpose: str | None) -> dict[str, Any]:
        """Return a list of files."""

    async def file(self, owner: str, file_id: str) -> dict[str, Any]:
        """Return a file's object."""

    async def content(self, owner: str, file_id: str) -> tuple[int, AsyncIterator[bytes]]:
        """Return the size of a file, and its content in blocks."""

    async def delete_file(self, owner: str, file_id: str) -> dict[str, Any]:
        """Delete a file."""

    async def create(self, owner: str, batch: NewBatch) -> dict[str, Any]:
        """Create a batch and return its object."""

    async def batch(self, owner: str, batch_id: str) -> dict[str, Any]:
        """Return a batch's object."""

    async def batches(self, owner: str, page: Page) -> dict[str, Any]:
        """Return a list of batches."""

    async def cancel(self, owner: str, batch_id: str) -> dict[str, Any]:
        """Ask for the end of a batch and return its object. Raises ApiError where it is over."""

    async def open_counts(self) -> Mapping[str, int]:
        """Return the number of batches in each state that is not final, and of their `requests` that are not done."""
