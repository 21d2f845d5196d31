"""Errors as OpenAI's clients read them: {"error": {message, type, param, code}} with a status that tells whether to try
again. No other shape leaves the endpoint."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.responses import JSONResponse

from engine.errors import RequestError

CODES = {"too_long": "context_length_exceeded"}  # where OpenAI has a word of its own


class ApiError(Exception):
    """Ends a request. `param` is the part of the request that it is about."""

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
        kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)

    @classmethod
    def of(cls, error: RequestError, param: str | None = None) -> "ApiError":
        return cls(400, CODES.get(error.code, error.code), error.message, param=param)

    @classmethod
    def of_body(cls, errors: Sequence[Mapping[str, Any]]) -> "ApiError":
        """Of what pydantic finds wrong with a request's body; the first thing is told."""
        first = errors[0]
        where = [part for part in first["loc"] if part != "body"]
        if first["type"] == "json_invalid" or not where:
            return cls(400, "invalid_json", "the body must be a JSON object, sent as application/json")
        param = str(where[0]) if where else None
        if first["type"] == "extra_forbidden":
            name = ".".join(map(str, where))
            return cls(400, "unsupported_parameter", f"{name!r} is not supported by this endpoint", param=name)
        if first["type"] == "missing":
            return cls(400, "missing_parameter", f"{'.'.join(map(str, where))!r} is required", param=param)
        # A field that may have several types has an error for each.
        reasons = dict.fromkeys(str(error["msg"]) for error in errors if list(error["loc"])[1:2] == where[:1])
        prefix = "" if param is None else f"{param}: "
        return cls(400, "invalid_parameter", prefix + "; ".join(reasons), param=param)
