"""The text of a generation, kept for models whose cache must be made anew once the text has outgrown a length."""

from __future__ import annotations

from torch import Tensor


class Text:
    """Tokens of R rows up to `limit` + 1 each, which is when the cache is made anew from them.

    Attributes:
        ids: int64 ``[R, limit + 1]``, right-padded with zeros.
    """

    def __init__(self, prompts: Tensor, longest: int, limit: int) -> None:
        self.ids = prompts.new_zeros(len(prompts), limit + 1)
        self.ids[:, :longest] = prompts[:, :longest]
        self._longest, self._limit = longest, limit

    def add(self, tokens: Tensor, position: Tensor) -> bool:
        """Keep the next token ``[R]`` of each row, at its `position` ``[R]``; whether one goes beyond the limit.

        The device is waited for only where that may be so.
        """
        self.ids.scatter_(1, position[:, None], tokens[:, None])
        self._longest += 1
        return self._longest > self._limit and bool((position >= self._limit).any())


def text_of(prompts: Tensor, longest: int, limit: int | None) -> Text | None:
    """What to keep of a generation from `prompts` ``[R, T]``; None if its cache is never made anew."""
    return None if limit is None or longest > limit else Text(prompts, longest, limit)
