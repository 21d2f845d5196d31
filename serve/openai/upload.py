"""Receives the multipart body of POST /v1/files piece by piece, so that memory does not grow with the file."""

from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from typing import Any

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

from moray.serve.batches import FileUpload
from moray.serve.errors import ApiError

MAX_FIELD_BYTES = 1024  # of a field that is no file
FIELDS = ("purpose", "expires_after[anchor]", "expires_after[seconds]")
MIN_EXPIRY_S, MAX_EXPIRY_S = 3600, 30 * 24 * 3600  # OpenAI's
DEFAULT_NAME = "batch.jsonl"


async def receive_file(content_type: str | None, body: AsyncIterator[bytes], upload: FileUpload) -> dict[str, Any]:
    """Write the file of a multipart body to `upload` and return its object. Raises ApiError."""
    try:
        form = _Form(content_type)
        async for data in body:
            for piece in form.parse(data):
                await upload.write(piece)
        form.end()
        expires_s = _check_fields(form.fields)
        if form.filename is None:
            raise _missing("file")
        return await upload.finish(form.filename, expires_s)
    except BaseException:
        with suppress(ApiError):
            await upload.discard()
        raise


class _Form:
    """Parses a multipart body.

    fields:    the values of its fields that are no file
    filename:  the name of its file; None before it came
    """

    def __init__(self, content_type: str | None) -> None:
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data" or not options.get(b"boundary"):
            message = "the body must be multipart/form-data with the fields file and purpose"
            raise ApiError(400, "invalid_multipart", message)
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self._pieces: list[bytes] = []
        self._headers: dict[bytes, bytes] = {}
        self._header = (bytearray(), bytearray())
        self._part: str | None = None
        self._has_ended = False
        self._parser = MultipartParser(
            options[b"boundary"],
            {
                "on_part_begin": self._begin,
                "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
                "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
                "on_header_end": self._end_header,
                "on_headers_finished": self._end_headers,
                "on_part_data": self._add,
                "on_end": self._end,
            },
        )

    def parse(self, data: bytes) -> list[bytes]:
        """Parse the next data of the body and return what it holds of the file."""
        self._pieces.clear()
        try:
            self._parser.write(data)
        except (MultipartParseError, UnicodeDecodeError):
            raise _invalid() from None
        return list(self._pieces)

    def end(self) -> None:
        """Raise ApiError where the body was cut off."""
        if not self._has_ended:
            raise _invalid()

    def _begin(self) -> None:
        self._headers.clear()
        self._header = (bytearray(), bytearray())

    def _end_header(self) -> None:
        name, value = self._header
        self._headers[bytes(name).lower()] = bytes(value)
        self._header = (bytearray(), bytearray())

    def _end_headers(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition"))
        name = options.get(b"name", b"").decode(errors="replace")
        if name == "file":
            if self.filename is not None:
                raise ApiError(400, "invalid_parameter", "file: give one file", param="file")
            self.filename = options.get(b"filename", b"").decode(errors="replace") or DEFAULT_NAME
        elif name not in FIELDS:
            message = f"{name[:80]}: is not a field of a file; there are file, {', '.join(FIELDS)}"
            raise ApiError(400, "unknown_parameter", message, param=name[:80])
        elif name in self.fields:
            raise ApiError(400, "invalid_parameter", f"{name}: is there twice", param=name)
        else:
            self.fields[name] = ""
        self._part = name

    def _add(self, data: bytes, start: int, end: int) -> None:
        if self._part == "file":
            self._pieces.append(data[start:end])
        elif self._part is not None:
            self.fields[self._part] += data[start:end].decode(errors="replace")
            if len(self.fields[self._part]) > MAX_FIELD_BYTES:
                message = f"{self._part}: is longer than {MAX_FIELD_BYTES:,} bytes"
                raise ApiError(400, "invalid_parameter", message, param=self._part)

    def _end(self) -> None:
        self._has_ended = True


def _check_fields(fields: Mapping[str, str]) -> int | None:
    """Return for how many seconds the file is to be kept; None where the fields do not say. Raises ApiError."""
    if "purpose" not in fields:
        raise _missing("purpose")
    if fields["purpose"] != "batch":
        raise ApiError(
            400, "invalid_purpose", "purpose: must be batch; this endpoint has no other files", param="purpose"
        )
    anchor, seconds = fields.get("expires_after[anchor]"), fields.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        message = "expires_after[anchor]: must be created_at"
        raise ApiError(400, "invalid_parameter", message, param="expires_after[anchor]")
    is_number = seconds is not None and len(seconds) < 10 and seconds.isascii() and seconds.isdecimal()
    if not is_number or not MIN_EXPIRY_S <= int(seconds or 0) <= MAX_EXPIRY_S:
        message = f"expires_after[seconds]: must be a whole number from {MIN_EXPIRY_S} to {MAX_EXPIRY_S}"
        raise ApiError(400, "invalid_parameter", message, param="expires_after[seconds]")
    return int(seconds or 0)


def _missing(name: str) -> ApiError:
    return ApiError(400, "missing_required_parameter", f"{name}: is required", param=name)


def _invalid() -> ApiError:
    return ApiError(400, "invalid_multipart", "the body is not complete multipart/form-data")
