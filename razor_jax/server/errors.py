"""Errors in the form that OpenAI's clients read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from .generation import Refused

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_RETRY_SECONDS = {429: "1", 503: "5"}
_REFUSED = {
    "too_large": (400, "context_length_exceeded"),
    "duplicate": (409, "duplicate_request"),
    "queue_full": (429, "queue_full"),
    "draining": (503, "draining"),
}


def _unicode(text: str) -> str:
    """Return a text that may quote a request without lone surrogates, which cannot be sent."""
    return text.encode("utf-8", "backslashreplace").decode()


class ApiError(Exception):
    """A request that is answered with an error.

    Attributes:
      status: HTTP status.
      param: name of the field at fault.
      code: short name of the error that a program can compare.
    """

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body."""
        kind = _TYPES.get(self.status, "server_error")
        message, param = _unicode(self.message), self.param and _unicode(self.param)
        return {"error": {"message": message, "type": kind, "param": param, "code": self.code}}

    def response(self) -> JSONResponse:
        """Return the HTTP response."""
        headers: Mapping[str, str] = {}
        if self.status in _RETRY_SECONDS:
            headers = {"retry-after": _RETRY_SECONDS[self.status]}
        if self.status == 401:
            headers = {"www-authenticate": "Bearer"}
        return JSONResponse(self.body, self.status, headers)


def from_refusal(refused: Refused) -> ApiError:
    """Return the error of a request that the engine refused."""
    status, code = _REFUSED[refused.reason]
    return ApiError(str(refused), status=status, code=code)


def on_api_error(request: Request, error: Exception) -> JSONResponse:
    """Answer a request that raised ApiError."""
    assert isinstance(error, ApiError)
    return error.response()


def on_http_error(request: Request, error: Exception) -> JSONResponse:
    """Answer a request for an unknown path or method."""
    assert isinstance(error, HTTPException)
    message = {
        404: f"there is no {request.url.path}: see docs/serving.md for the paths",
        405: f"{request.url.path} does not take {request.method}",
    }.get(error.status_code, str(error.detail))
    response = ApiError(message, status=error.status_code).response()
    response.headers.update(error.headers or {})
    return response


def on_fault(request: Request, error: Exception) -> JSONResponse:
    """Answer a request that failed inside the server. The message shows nothing of the fault."""
    return ApiError("the server failed on this request: see its log", status=500).response()
