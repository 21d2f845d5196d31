"""Models of the Batch API's bodies and responses: files and batches."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, StringConstraints

from moray.engine.settings import types as t
from moray.serve.openai.responses import Response
from moray.serve.openai.upload import MAX_EXPIRY_S, MIN_EXPIRY_S
from moray.serve.request_body import Int, RequestBody

Metadata = Annotated[
    Annotated[
        dict[
            Annotated[str, StringConstraints(max_length=64)],
            Annotated[str, StringConstraints(max_length=512)],
        ],
        Field(max_length=16),
    ],
    t.must("an object of at most 16 texts, with names of up to 64 and values of up to 512 characters"),
]
Window = Annotated[
    Annotated[str, Field(pattern=r"^[1-9][0-9]{0,3}[hd]$")],
    t.must("a number of hours or days, such as 24h or 3d"),
]


class OutputExpiry(RequestBody):
    """Says how long the output files of a batch are kept."""

    anchor: Literal["created_at"]
    seconds: Int = Field(ge=MIN_EXPIRY_S, le=MAX_EXPIRY_S)


class BatchBody(RequestBody):
    """Describes the body of a request to create a batch.

    completion_window:  24h, or another number of hours (h) or days (d)
    """

    refused: ClassVar = {}

    input_file_id: str
    endpoint: Literal["/v1/chat/completions", "/v1/completions"]
    completion_window: Window
    metadata: Metadata | None = None
    output_expires_after: OutputExpiry | None = None

    @property
    def window_s(self) -> int:
        """Return the seconds of the completion window."""
        return int(self.completion_window[:-1]) * {"h": 3600, "d": 24 * 3600}[self.completion_window[-1]]


class FileObject(Response):
    """Describes a file. Times are seconds since 1970."""

    id: str
    object: str
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: str
    status_details: None


class FileList(Response):
    """Lists files; a page of them."""

    object: str
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedFile(Response):
    """Answers the deletion of a file."""

    id: str
    object: str
    deleted: bool


class BatchError(Response):
    """Describes what is wrong with the input file; line counts from 1."""

    code: str
    message: str
    param: str | None
    line: int | None


class BatchErrors(Response):
    """Lists why the input file of a batch was rejected."""

    object: str
    data: list[BatchError]


class RequestCounts(Response):
    """Counts the requests of a batch; those that were never run are failed in the end."""

    total: int
    completed: int
    failed: int


class BatchUsage(Response):
    """Counts the tokens of the completed requests. The details are not counted: they are 0."""

    input_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens: int
    output_tokens_details: dict[str, int]
    total_tokens: int


class BatchObject(Response):
    """Describes a batch. Times are seconds since 1970."""

    id: str
    object: str
    endpoint: str
    model: str | None
    errors: BatchErrors | None
    input_file_id: str
    completion_window: str
    status: str
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    usage: BatchUsage
    metadata: dict[str, str] | None


class BatchList(Response):
    """Lists batches, newest first; a page of them."""

    object: str
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


UPLOAD_SCHEMA: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "additionalProperties": False,
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": ["batch"]},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {
                            "type": "integer", "minimum": MIN_EXPIRY_S, "maximum": MAX_EXPIRY_S
                        },
                    },
                }
            }
        },
    }
}  # fmt: skip
