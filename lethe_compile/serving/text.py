"""Tokens to text as they come: no half characters, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_PATIENCE = 32  # tokens that wait for the end of a character; one has at most four bytes
_PARTIAL = "\ufffd"  # what tokenizers decode the bytes of an incomplete character to


class Detokenizer:
    """Text of one token after the other; together it is what ``tokenizer.decode`` makes of all of them.

    A token's text depends on its neighbours (spaces, characters of several bytes), so that the newest tokens are
    decoded together with those before them, and text that ends in an incomplete character waits for the next token.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._special = tokenizer, frozenset(tokenizer.all_special_ids)
        self._ids: list[int] = []
        self._start, self._read = 0, 0  # context and told tokens end here: ids[start:read] is context

    def push(self, token: int) -> str:
        """The text that `token` completes; often its own, sometimes none."""
        if token in self._special:
            return ""
        self._ids.append(token)
        return self._fresh(final=len(self._ids) - self._read >= _PATIENCE)

    def flush(self) -> str:
        """What still waits, when no more tokens come."""
        return self._fresh(final=True)

    def _fresh(self, *, final: bool) -> str:
        known = self._decode(self._ids[self._start : self._read])
        text = self._decode(self._ids[self._start :])
        if len(text) <= len(known) or (text.endswith(_PARTIAL) and not final):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return text[len(known) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)) if ids else ""


class StopScanner:
    """Cuts a text before the first of some strings, and holds back what may be the beginning of one.

    Attributes:
        stopped: one was found; what `push` gave is all the text there is.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._held = tuple(stops), ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Text that is safe to show."""
        if self.stopped:
            return ""
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped = True
            return self._release(min(found))
        return self._release(len(self._held) - self._beginning())

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        return "" if self.stopped else self._release(len(self._held))

    def _beginning(self) -> int:
        """Most characters at the end that begin a stop string."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for count in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-count:]) for stop in self._stops):
                return count
        return 0

    def _release(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        return text
