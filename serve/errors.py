"""Errors in the shape that OpenAI's clients read: {"error": {message, type, param, code}}, with a status that shows
whether a retry can help. The endpoint sends no other shape."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastapi.responses import JSONResponse

from moray.engine.errors import RequestError
from moray.engine.settings.problems import describe

CODES = {"too_long": "context_length_exceeded"}  # code of a RequestError -> OpenAI's, where they differ


class ApiError(Exception):
    """Ends a request with an error response.

    status:   of HTTP
    code:     a short name for programs
    message:  one sentence for people
    param:    the field of the request that is wrong
    headers:  further headers of the response
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """Return the JSON object that is sent."""
        kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)

    @classmethod
    def from_request_error(cls, error: RequestError, param: str | None = None) -> "ApiError":
        """Make one of an error that the engine or the tokenizer raised about a request."""
        return cls(400, CODES.get(error.code, error.code), error.message, param=param)

    @classmethod
    def from_body_errors(cls, errors: Sequence[Mapping[str, Any]]) -> "ApiError":
        """Make one of the errors that pydantic found in a request's body: it reports the first."""
        first = errors[0]
        own = first.get("ctx", {})
        param = _path([*first["loc"][1:], *own.get("at", ())])  # loc[0] is "body" itself
        if first["type"] == "json_invalid" or not param:
            return cls(400, "invalid_json", "the body must be a JSON object, sent as application/json")
        code = "missing_required_parameter" if first["type"] == "missing" else own.get("code", "invalid_parameter")
        return cls(400, code, f"{param}: {describe(first)}", param=param)


def _path(parts: Iterable[str | int]) -> str:
    """Write a path as OpenAI does: messages[2].content[0].type. The tags of unions are left out."""
    path = ""
    for part in parts:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not part.startswith("<"):
            path += f".{part}" if path else part
    return path
