"""Errors of the HTTP service, in the shape that OpenAI's clients read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lethe_compile.errors import EngineBusyError, EngineClosedError, InputError, LetheError

RETRY_SECONDS = 1
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that ends with an HTTP status.

    Attributes:
        status: of HTTP.
        param: the parameter at fault, None where it is none in particular.
        code: a short name for programs, such as "context_length_exceeded".
        headers: sent with it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})
        if status in (429, 503):
            self.headers.setdefault("Retry-After", str(RETRY_SECONDS))

    def body(self) -> dict[str, Any]:
        """``{"error": {"message", "type", "param", "code"}}``."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def unavailable(message: str) -> ApiError:
    """503: now, here, not; somewhere else or soon, perhaps."""
    return ApiError(503, message, code="unavailable")


def translated(error: Exception) -> ApiError:
    """What a client is told of `error`; of what nobody foresaw, nothing but that it happened."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineBusyError):
        return ApiError(429, str(error), code="queue_full")
    if isinstance(error, EngineClosedError):
        return unavailable(str(error))
    if isinstance(error, InputError):
        return ApiError(400, str(error))
    if isinstance(error, LetheError):
        return ApiError(500, str(error), code="generation_failed")
    return ApiError(500, "the service failed on this request; its log says more", code="internal_error")
