"""One sequence of an answer: chunks of tokens to pieces of text."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from lethe_compile.serving.metrics import Metrics
from lethe_compile.serving.request import TokenLogprobs
from lethe_compile.serving.source import Chunk, Stream
from lethe_compile.serving.text import Detokenizer, StopScanner


@dataclass(frozen=True)
class Figure:
    """Log-probabilities at one token, and where its text begins."""

    logprobs: TokenLogprobs
    offset: int


@dataclass
class Piece:
    """What is new of a choice; the last one has a `finish_reason`, as OpenAI has them ("stop" or "length")."""

    text: str = ""
    figures: list[Figure] = field(default_factory=list)
    finish_reason: str | None = None

    def __bool__(self) -> bool:
        return bool(self.text or self.figures or self.finish_reason)


class Choice:
    """The text of one request, as it comes.

    Args:
        stop_ids: tokens that end the text and are no part of it.
        stops: strings that end it likewise; the request is cancelled when one comes.
        tokenizer: None gives no text.

    Attributes:
        tokens: generated, the one that ended it included.
    """

    def __init__(
        self,
        stream: Stream,
        tokenizer: Any,
        stops: Sequence[str],
        stop_ids: Collection[int],
        metrics: Metrics,
        begun: float,
    ) -> None:
        self._stream, self._stop_ids, self._metrics, self._begun = stream, stop_ids, metrics, begun
        self._words = None if tokenizer is None else Detokenizer(tokenizer)
        self._scanner = StopScanner(stops)
        self._pending: list[Figure] = []  # of text that is held back
        self._seen = self._shown = 0  # characters
        self.tokens = 0

    async def close(self) -> None:
        """Cancel what is left of it."""
        await self._stream.aclose()

    async def pieces(self) -> AsyncIterator[Piece]:
        """All of them; closes the stream whichever way it ends."""
        try:
            async for chunk in self._stream:
                if self.tokens == 0 and chunk.tokens:
                    self._metrics.first_token.observe(time.monotonic() - self._begun)
                piece = self._piece(chunk)
                if piece:
                    yield piece
                if piece.finish_reason:
                    self._observe(chunk)
                    break
        finally:
            await self.close()

    def _piece(self, chunk: Chunk) -> Piece:
        text = ""
        figures = iter(chunk.logprobs)
        for token in chunk.tokens:
            self.tokens += 1
            figure = next(figures, None)
            if token in self._stop_ids:
                continue
            if figure is not None:
                self._pending.append(Figure(figure, self._seen))
            fresh = "" if self._words is None else self._words.push(token)
            self._seen += len(fresh)
            text += self._scanner.push(fresh)
            if self._scanner.stopped:
                return self._released(text, "stop")
        if chunk.finish_reason is None:
            return self._released(text, None)
        rest = "" if self._words is None else self._words.flush()
        self._seen += len(rest)
        text += self._scanner.push(rest) + self._scanner.flush()
        return self._released(text, "stop" if self._scanner.stopped else chunk.finish_reason)

    def _released(self, text: str, reason: str | None) -> Piece:
        """With the figures of tokens whose text is shown, all others being held back or cut off with it."""
        self._shown += len(text)
        whole = not self._scanner.stopped and (reason is not None or self._shown == self._seen)
        shown = [one for one in self._pending if whole or one.offset < self._shown]
        self._pending = self._pending[len(shown) :]
        return Piece(text, shown, reason)

    def _observe(self, chunk: Chunk) -> None:
        seconds = time.monotonic() - self._begun
        self._metrics.end_to_end.observe(seconds)
        if chunk.stats is not None:
            if chunk.stats.queued is not None:
                self._metrics.queue_time.observe(chunk.stats.queued)
            if chunk.stats.per_token is not None:
                self._metrics.per_token.observe(chunk.stats.per_token)
