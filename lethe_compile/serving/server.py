"""A uvicorn server that drains: after SIGTERM it finishes what it has accepted, and refuses what comes."""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from collections.abc import Callable
from types import FrameType

import uvicorn

from lethe_compile.errors import InputError
from lethe_compile.serving.gate import Gate
from lethe_compile.serving.log import log

_SEND_BUFFER = 64 << 10  # bytes of an answer that the kernel holds for a slow reader
_LAST_WORDS = 5  # seconds for answers whose time is up to be told so


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Its connections buffer little of what nobody reads.

    Raises:
        InputError: the address cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        listener.bind(address)
        listener.listen(1024)
    except OSError as error:
        raise InputError(f"cannot listen on {host}:{port}: {error}") from error
    return listener


class Server(uvicorn.Server):
    """The first SIGTERM or SIGINT drains, the second ends at once.

    Args:
        seconds: that calls have to finish once it drains.
        give_up: ends those that have not; called in a thread.
    """

    def __init__(self, gate: Gate, seconds: float, give_up: Callable[[], object]) -> None:
        config = uvicorn.Config(
            gate, log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=_LAST_WORDS
        )
        super().__init__(config)
        self._gate, self._seconds, self._give_up = gate, seconds, give_up
        self._deadline: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Of the signals that uvicorn watches."""
        del frame
        if self._deadline is not None:
            self.should_exit = self.force_exit = True
            return
        self._gate.draining, self._deadline = True, time.monotonic() + self._seconds
        name = signal.Signals(sig).name
        log.warning("%s: finishing %d calls within %.0f s", name, self._gate.active, self._seconds)

    async def on_tick(self, counter: int) -> bool:
        """Whether to end; uvicorn asks ten times a second."""
        ends = await super().on_tick(counter)
        if ends or self._deadline is None:
            return ends
        if self._gate.active and time.monotonic() < self._deadline:
            return False
        if self._gate.active:
            log.warning("%d calls are not finished in time, and end now", self._gate.active)
            await asyncio.to_thread(self._give_up)
        return True
