"""/v1/files and /v1/batches: the routes of the Batch API, over a BatchService."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import Response, StreamingResponse

from moray.serve.batches import BatchService, NewBatch, Page
from moray.serve.errors import ApiError
from moray.serve.openai.batch_objects import (
    UPLOAD_SCHEMA,
    BatchBody,
    BatchList,
    BatchObject,
    DeletedFile,
    FileList,
    FileObject,
)
from moray.serve.openai.responses import GUARDED, describe_responses
from moray.serve.openai.upload import receive_file

FILES = "/v1/files"  # whose body RequestGuardMiddleware does not read
STORED = (*GUARDED, 501, 503)

router = APIRouter()


def _service(request: Request) -> BatchService:
    service: BatchService | None = request.app.state.batches
    if service is None:
        message = "this endpoint offers no files and batches: its operator can set batch_store"
        raise ApiError(501, "batches_not_offered", message, headers={"x-should-retry": "false"})
    return service


def _owner(request: Request) -> str:
    owner: str = request.state.key
    return owner


Service = Annotated[BatchService, Depends(_service)]
Owner = Annotated[str, Depends(_owner)]
Purpose = Annotated[Literal["batch", "batch_output"] | None, Query(description="the kind of files")]
After = Annotated[str | None, Query(description="the id before the first one that is wanted")]


@router.post(FILES, responses=describe_responses(*STORED, 400, 507, ok=FileObject), openapi_extra=UPLOAD_SCHEMA)
async def add_file(service: Service, owner: Owner, request: Request) -> dict[str, Any]:
    """Upload the input of a batch: JSONL, a request in each line."""
    upload = await service.new_upload(owner)
    return await receive_file(request.headers.get("content-type"), request.stream(), upload)


@router.get(FILES, responses=describe_responses(*STORED, 400, ok=FileList))
async def files(
    service: Service,
    owner: Owner,
    purpose: Purpose = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    after: After = None,
) -> dict[str, Any]:
    """List files, newest first."""
    return await service.files(owner, Page(limit, after, order == "asc"), purpose)


@router.get(FILES + "/{file_id}", responses=describe_responses(*STORED, 404, ok=FileObject))
async def file(service: Service, owner: Owner, file_id: str) -> dict[str, Any]:
    """Describe a file."""
    return await service.file(owner, file_id)


CONTENT: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/octet-stream": {}}, "description": "the content"}
}


@router.get(
    FILES + "/{file_id}/content",
    response_class=StreamingResponse,
    responses=describe_responses(*STORED, 404) | CONTENT,
)
async def content(service: Service, owner: Owner, file_id: str) -> Response:
    """Return the content of a file."""
    size, blocks = await service.content(owner, file_id)
    return StreamingResponse(blocks, media_type="application/octet-stream", headers={"Content-Length": str(size)})


@router.delete(FILES + "/{file_id}", responses=describe_responses(*STORED, 404, ok=DeletedFile))
async def delete_file(service: Service, owner: Owner, file_id: str) -> dict[str, Any]:
    """Delete a file. A batch that was made of it goes on."""
    return await service.delete_file(owner, file_id)


@router.post("/v1/batches", responses=describe_responses(*STORED, 400, 404, ok=BatchObject))
async def create(service: Service, owner: Owner, body: BatchBody) -> dict[str, Any]:
    """Create a batch of an uploaded file, which runs when nothing else does."""
    expiry = body.output_expires_after
    batch = NewBatch(
        body.input_file_id,
        body.endpoint,
        body.completion_window,
        body.window_s,
        body.metadata,
        None if expiry is None else expiry.seconds,
    )
    return await service.create(owner, batch)


@router.get("/v1/batches", responses=describe_responses(*STORED, 400, ok=BatchList))
async def batches(
    service: Service, owner: Owner, limit: Annotated[int, Query(ge=1, le=100)] = 20, after: After = None
) -> dict[str, Any]:
    """List batches, newest first."""
    return await service.batches(owner, Page(limit, after))


@router.get("/v1/batches/{batch_id}", responses=describe_responses(*STORED, 404, ok=BatchObject))
async def batch(service: Service, owner: Owner, batch_id: str) -> dict[str, Any]:
    """Describe a batch: its state, its counts, and its output files in the end."""
    return await service.batch(owner, batch_id)


@router.post("/v1/batches/{batch_id}/cancel", responses=describe_responses(*STORED, 404, 409, ok=BatchObject))
async def cancel(service: Service, owner: Owner, batch_id: str) -> dict[str, Any]:
    """Cancel a batch. What is done is kept, and its output files have it."""
    return await service.cancel(owner, batch_id)
