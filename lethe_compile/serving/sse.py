"""Server-sent events to a client that may read slowly, or leave."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

DONE = b"data: [DONE]\n\n"
_T = TypeVar("_T")


class ClientLeft(Exception):
    """The connection is gone, or nothing of an answer was taken for too long."""


def event(data: Mapping[str, Any]) -> bytes:
    """One event of JSON."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def gone(receive: Receive) -> None:
    """Returns when the client has closed the connection; the request's body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(work: Awaitable[_T], receive: Receive) -> _T:
    """The result of `work`, which is cancelled when the client leaves.

    Raises:
        ClientLeft: it did.
    """
    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientLeft
        return task.result()
    finally:
        await _cancelled(task, watch)


class EventStream(Response):
    """Events as they come. One is asked for when the one before it has left this process's buffers.

    Args:
        events: bytes of events.
        close: called at the end, which also comes when the client leaves, or takes nothing for `stall` seconds.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], Awaitable[None]], stall: float) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._close, self._stall = events, close, stall

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(ClientLeft):  # the server closes the connection of an answer that does not end
            try:
                await unless_gone(self._send(send), receive)
            finally:
                await self._close()

    async def _send(self, send: Send) -> None:
        put = _impatient(send, self._stall)
        await put({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for data in self._events:
            await put({"type": "http.response.body", "body": data, "more_body": True})
        await put({"type": "http.response.body", "body": b"", "more_body": False})


def _impatient(send: Send, seconds: float) -> Send:
    async def put(message: Any) -> None:
        try:
            await asyncio.wait_for(send(message), seconds)
        except (asyncio.TimeoutError, OSError) as error:
            raise ClientLeft from error

    return put


async def _cancelled(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
