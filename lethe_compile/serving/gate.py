"""What stands before the service: who may enter, how much a request may carry, and counting who is inside."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
from collections.abc import Sequence

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lethe_compile.serving.api_errors import ApiError, unavailable
from lethe_compile.serving.metrics import Metrics

_FREE = ("/health",)  # without a key
_PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics")
_BODY_SECONDS = 60.0  # for all of a request's body


class Gate:
    """ASGI middleware. Checks of headers only, so that what is refused costs nothing; bodies are not read here.

    Attributes:
        draining: calls of the API are refused with 503.
        active: calls of the API that are being answered.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, keys: Sequence[str], max_body: int) -> None:
        self._app, self._metrics, self._max_body = app, metrics, max_body
        self._keys = [_digest(key.encode()) for key in keys]
        self.draining, self.active = False, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in _PATHS else "other"

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.http.labels(path, message["status"]).inc()
            await send(message)

        if (refusal := self._refusal(scope)) is not None:
            await _send(refusal, counted)
            return
        if not scope["path"].startswith("/v1/"):
            await self._app(scope, receive, counted)
            return
        self._enter(1)
        try:
            await self._app(scope, receive, counted)
        finally:
            self._enter(-1)

    def _enter(self, step: int) -> None:
        self.active += step
        self._metrics.active.set(self.active)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = dict(scope["headers"])
        if self._keys and scope["path"] not in _FREE and not self._authorised(headers.get(b"authorization", b"")):
            challenge = {"WWW-Authenticate": "Bearer"}
            return ApiError(401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key",
                            headers=challenge)  # fmt: skip
        if self.draining and scope["path"].startswith("/v1/"):
            return unavailable("the service is shutting down and takes no more requests")
        declared = headers.get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > self._max_body:
            return too_large(self._max_body)
        return None

    def _authorised(self, header: bytes) -> bool:
        kind, _, key = header.partition(b" ")
        given = _digest(key.strip())
        same = [hmac.compare_digest(given, known) for known in self._keys]  # all of them, in any case
        return any(same) and kind.lower() == b"bearer"


def too_large(limit: int) -> ApiError:
    """413; the connection is closed, since what else comes on it is the rest of the body."""
    message = f"the body is larger than {limit} bytes"
    return ApiError(413, message, code="body_too_large", headers={"Connection": "close"})


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body, counted as it comes.

    Raises:
        ApiError: 413 for more than `limit` bytes, 408 if it takes too long.
    """

    async def read() -> bytes:
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > limit:
                raise too_large(limit)
        return bytes(body)

    try:
        return await asyncio.wait_for(read(), _BODY_SECONDS)
    except asyncio.TimeoutError as error:
        message = f"the body did not come within {_BODY_SECONDS:.0f} s"
        raise ApiError(408, message, headers={"Connection": "close"}) from error


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()  # keys of one length, so that the comparison tells nothing of it


async def _send(error: ApiError, send: Send) -> None:
    body = json.dumps(error.body()).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **error.headers}
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
