"""One request: its tokens as they come, for threads and for asyncio, and its end."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import Any, Literal

from lethe_compile.serving.sampling import SamplingParams
from lethe_compile.serving.stats import RequestStats

FinishReason = Literal["stop", "length", "cancelled", "error"]
Status = Literal["queued", "running", "finished"]


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural log-probabilities at one generated token, of the model's own logits, before any processor or warper.

    `top` has the `SamplingParams.logprobs` likeliest tokens, best first; the chosen one need not be among them.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Completion:
    """How a request ended.

    Attributes:
        tokens: what was generated, the stop token, if one came, included.
        finish_reason: "stop": a stop token or stop string; "length": `max_new_tokens`; "cancelled": by `cancel`, or by
            a closing engine, `tokens` being what there was; an error is raised instead.
        logprobs: one for each token, where `SamplingParams.logprobs` asks for them, else empty.
    """

    id: str
    prompt: tuple[int, ...]
    tokens: list[int]
    finish_reason: FinishReason
    stats: RequestStats
    logprobs: list[TokenLogprobs]


class Request:
    """A submitted prompt; made by `Engine.submit`. Any thread, and any number of consumers, may use it.

    Iterate (``for token in request``, ``async for token in request``) for tokens as they are generated: every consumer
    gets all of them from the first on. ``request.result()`` and ``await request`` wait for the `Completion`.

    When a request fails, whoever waits gets its error. When it is cancelled, iteration ends, and the `Completion` says
    so.

    Attributes:
        id: unique in the process, or as given to `submit`.
        prompt: its token ids.
        params: how it is sampled, and when it ends.
        submitted: when, by `time.monotonic()`.
    """

    def __init__(
        self, id: str, prompt: tuple[int, ...], params: SamplingParams, cancel: Callable[[Request], None]
    ) -> None:
        self.id, self.prompt, self.params = id, prompt, params
        self.submitted = time.monotonic()
        self._cancel = cancel
        self._changed = threading.Condition(threading.RLock())
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._reason: FinishReason | None = None
        self._error: BaseException | None = None
        self._status: Status = "queued"
        self._stats = RequestStats()
        self._listeners: list[Callable[[], None]] = []

    # -------------------------------------------------------------------------------------------------- consumers

    @property
    def status(self) -> Status:
        """ "queued" (also again after a preemption), "running", or "finished", however it ended."""
        return self._status

    @property
    def done(self) -> bool:
        """Whether it has ended, however."""
        return self._status == "finished"

    @property
    def finish_reason(self) -> FinishReason | None:
        """See `Completion`; None while it goes on."""
        return self._reason

    @property
    def error(self) -> BaseException | None:
        """What `result` raises, once it has failed."""
        return self._error

    @property
    def tokens(self) -> list[int]:
        """A copy of the tokens generated so far."""
        with self._changed:
            return list(self._tokens)

    @property
    def logprobs(self) -> list[TokenLogprobs]:
        """A copy of those of the tokens generated so far; empty if `params.logprobs` asks for none."""
        with self._changed:
            return list(self._logprobs)

    @property
    def stats(self) -> RequestStats:
        """Its times and what the cache did for it; final once it has ended."""
        return self._stats

    def cancel(self) -> None:
        """End it at the next step, if it has not ended; its pages are free from then on. Returns at once."""
        self._cancel(self)

    def result(self, timeout: float | None = None) -> Completion:
        """Wait for the end.

        Raises:
            TimeoutError: it did not end within `timeout` seconds; it goes on.
            LetheError: it failed, or the engine did; says why.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self.done, timeout):
                raise TimeoutError(f"request {self.id} has not ended within {timeout} s; it goes on: wait or cancel it")
        return self._completion()

    def add_done_callback(self, tell: Callable[[Request], object]) -> None:
        """Call `tell(request)` once it has ended: in the engine's thread, so briefly; at once if it has already."""

        def listener() -> None:
            if self.done:
                self._listeners.remove(listener)
                tell(self)

        with self._changed:
            self._listeners.append(listener)
            listener()

    def __iter__(self) -> Iterator[int]:
        at = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self.done or len(self._tokens) > at)  # noqa: B023  (used at once)
                fresh, done = self._tokens[at:], self.done
            yield from fresh
            at += len(fresh)
            if done:
                break
        if self._error is not None:
            raise self._error

    async def __aiter__(self) -> AsyncIterator[int]:
        at = 0
        with _Wake(self) as wake:
            while True:
                await wake.wait_for(lambda: self.done or len(self._tokens) > at)  # noqa: B023  (used at once)
                with self._changed:
                    fresh, done = self._tokens[at:], self.done
                for token in fresh:
                    yield token
                at += len(fresh)
                if done and at == len(self._tokens):
                    break
        if self._error is not None:
            raise self._error

    def __await__(self) -> Generator[Any, None, Completion]:
        return self._wait().__await__()

    async def _wait(self) -> Completion:
        with _Wake(self) as wake:
            await wake.wait_for(lambda: self.done)
        return self._completion()

    def _completion(self) -> Completion:
        if self._error is not None:
            raise self._error
        if self._reason is None:
            raise CancelledError(f"request {self.id} has no result")
        return Completion(self.id, self.prompt, self.tokens, self._reason, self._stats, self.logprobs)

    def __repr__(self) -> str:
        what = self._reason or self._status
        return f"Request({self.id!r}, {len(self.prompt)} prompt tokens, {len(self._tokens)} new, {what})"

    # ------------------------------------------------------------------------------------ the engine's thread only

    def _advance(self, status: Status | None = None, stats: RequestStats | None = None) -> None:
        with self._changed:
            self._status = status or self._status
            self._stats = stats or self._stats

    def _deliver(self, token: int, logprobs: TokenLogprobs | None = None) -> None:
        with self._changed:
            self._tokens.append(token)
            if logprobs is not None:
                self._logprobs.append(logprobs)
            self._notify()

    def _end(self, reason: FinishReason, stats: RequestStats, error: BaseException | None = None) -> None:
        with self._changed:
            if self._status != "finished":
                self._reason, self._error, self._stats, self._status = reason, error, stats, "finished"
                self._notify()

    def _notify(self) -> None:
        self._changed.notify_all()
        for listener in list(self._listeners):
            listener()


class _Wake:
    """Lets a coroutine wait for what another thread changes; nothing polls, and a loop that is gone is left alone."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._event = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def __enter__(self) -> _Wake:
        with self._request._changed:
            self._request._listeners.append(self._tell)
        return self

    def __exit__(self, *_: object) -> None:
        with self._request._changed:
            self._request._listeners.remove(self._tell)

    def _tell(self) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._event.set)

    async def wait_for(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._event.wait()
            self._event.clear()
