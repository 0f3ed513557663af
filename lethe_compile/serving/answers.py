"""Answers as OpenAI's API has them, whole and as events, of one or several choices."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from lethe_compile.serving.api_errors import translated
from lethe_compile.serving.choice import Choice, Figure, Piece
from lethe_compile.serving.log import log
from lethe_compile.serving.sse import DONE, event

_BUFFERED = 64  # pieces of all choices that wait for a slow reader; the engine's tokens wait beyond that


class Format:
    """What differs between completions and chats.

    Args:
        tokenizer: names the tokens of log-probabilities.
    """

    prefix: str
    whole: str
    part: str

    def __init__(self, model: str, tokenizer: Any) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._id, self._created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())

    def opening(self, index: int) -> dict[str, Any] | None:
        """The choice of an event before the first text; None for no such event."""
        raise NotImplementedError

    def delta(self, index: int, piece: Piece) -> dict[str, Any]:
        """The choice of an event."""
        raise NotImplementedError

    def choice(self, index: int, piece: Piece) -> dict[str, Any]:
        """A choice of a whole answer."""
        raise NotImplementedError

    def envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """What goes around choices."""
        return {
            "id": self._id, "object": kind, "created": self._created, "model": self._model, "choices": choices
        }  # fmt: skip

    def _name(self, token: int) -> str:
        return f"token_id:{token}" if self._tokenizer is None else str(self._tokenizer.decode([token]))


class CompletionFormat(Format):
    """`/v1/completions`."""

    prefix, whole, part = "cmpl", "text_completion", "text_completion"

    def opening(self, index: int) -> None:
        return None

    def delta(self, index: int, piece: Piece) -> dict[str, Any]:
        figures = self._logprobs(piece.figures) if piece.figures else None
        return {"index": index, "text": piece.text, "logprobs": figures, "finish_reason": piece.finish_reason}

    choice = delta

    def _logprobs(self, figures: Sequence[Figure]) -> dict[str, Any]:
        each = [one.logprobs for one in figures]
        return {
            "tokens": [self._name(one.token) for one in each],
            "token_logprobs": [one.logprob for one in each],
            "top_logprobs": [{self._name(token): value for token, value in one.top} for one in each],
            "text_offset": [one.offset for one in figures],
        }


class ChatFormat(Format):
    """`/v1/chat/completions`."""

    prefix, whole, part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self, index: int) -> dict[str, Any]:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def delta(self, index: int, piece: Piece) -> dict[str, Any]:
        delta = {"content": piece.text} if piece.text else {}
        return self._with(piece, {"index": index, "delta": delta})

    def choice(self, index: int, piece: Piece) -> dict[str, Any]:
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return self._with(piece, {"index": index, "message": message})

    def _with(self, piece: Piece, choice: dict[str, Any]) -> dict[str, Any]:
        content = [
            {**self._token(one.logprobs.token, one.logprobs.logprob),
             "top_logprobs": [self._token(token, value) for token, value in one.logprobs.top]}
            for one in piece.figures
        ]  # fmt: skip
        figures = {"content": content, "refusal": None} if content else None
        return {**choice, "logprobs": figures, "finish_reason": piece.finish_reason}

    def _token(self, token: int, value: float) -> dict[str, Any]:
        name = self._name(token)
        partial = "\ufffd" in name  # a token of some bytes of a character has no text that could be encoded
        return {"token": name, "logprob": value, "bytes": None if partial else list(name.encode())}


class Answer:
    """The choices of one call, generated side by side.

    Args:
        prompt_tokens: of all prompts, each counted once.
    """

    def __init__(self, form: Format, choices: Sequence[Choice], prompt_tokens: int) -> None:
        self._form, self._choices, self._prompt_tokens = form, choices, prompt_tokens

    async def whole(self) -> dict[str, Any]:
        """The answer at once."""
        sums = [Piece() for _ in self._choices]
        async for index, piece in self._pieces():
            total = sums[index]
            total.text += piece.text
            total.figures += piece.figures
            total.finish_reason = piece.finish_reason
        choices = [self._form.choice(index, total) for index, total in enumerate(sums)]
        return {**self._form.envelope(self._form.whole, choices), "usage": self._usage()}

    async def events(self, include_usage: bool) -> AsyncIterator[bytes]:
        """The answer in events. What fails once they have begun is an event, too; clients raise it."""
        usage = {"usage": None} if include_usage else {}
        form = self._form
        try:
            openings = [one for one in map(form.opening, range(len(self._choices))) if one is not None]
            for opening in openings:
                yield event({**form.envelope(form.part, [opening]), **usage})
            async for index, piece in self._pieces():
                yield event({**form.envelope(form.part, [form.delta(index, piece)]), **usage})
            if include_usage:
                yield event({**form.envelope(form.part, []), "usage": self._usage()})
            yield DONE
        except Exception as error:
            told = translated(error)
            if told.status >= 500:
                log.error("a stream has failed", exc_info=error)
            yield event(told.body())

    async def close(self) -> None:
        """Cancel what is left of it; also if nothing was asked of it."""
        for choice in self._choices:
            await choice.close()

    def _usage(self) -> dict[str, int]:
        new = sum(choice.tokens for choice in self._choices)
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": new,
            "total_tokens": self._prompt_tokens + new,
        }

    async def _pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Pieces of all choices as they come."""
        came: asyncio.Queue[tuple[int, Piece] | BaseException | None] = asyncio.Queue(_BUFFERED)

        async def feed(index: int, choice: Choice) -> None:
            try:
                async for piece in choice.pieces():
                    await came.put((index, piece))
                await came.put(None)
            except Exception as error:
                await came.put(error)

        tasks = [asyncio.create_task(feed(*one)) for one in enumerate(self._choices)]
        left = len(tasks)
        try:
            while left:
                one = await came.get()
                if isinstance(one, BaseException):
                    raise one
                if one is None:
                    left -= 1
                else:
                    yield one
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.close()  # a task that never ran has closed nothing
