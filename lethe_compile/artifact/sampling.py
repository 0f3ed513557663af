"""How logits become tokens, in NumPy: greedily, or drawn after temperature, top-k and top-p, in this order."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lethe_compile.errors import InputError

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass
class Sampler:
    """Chooses a token a row from logits ``[rows, vocab]``.

    Greedy unless one of `temperature`, `top_k`, `top_p` or `seed` is given. `top_k` keeps the k most probable tokens,
    and all that tie with the last of them; `top_p` the fewest whose probabilities add up to at least p. Equal seeds
    draw equal tokens.

    Raises:
        InputError: a setting is out of range.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, allowed, ok in (
            ("temperature", "> 0", self.temperature is None or self.temperature > 0),
            ("top_k", ">= 1", self.top_k is None or self.top_k >= 1),
            ("top_p", "in (0, 1]", self.top_p is None or 0 < self.top_p <= 1),
        ):
            if not ok:
                raise InputError(f"{name}={getattr(self, name)!r} is not allowed: must be None or {allowed}")
        self._random = np.random.default_rng(self.seed)

    @property
    def greedy(self) -> bool:
        return self.temperature is None and self.top_k is None and self.top_p is None and self.seed is None

    def choose(self, logits: Floats) -> Ints:
        """The next token ``[rows]``."""
        if self.greedy:
            return np.asarray(logits.argmax(axis=1), np.int64)
        probability = _softmax(self._warped(logits.astype(np.float64)))
        # One draw a row, by the inverse of its distribution function.
        cumulated = probability.cumsum(axis=1)
        drawn = self._random.random((len(logits), 1)) * cumulated[:, -1:]
        return np.asarray((cumulated > drawn).argmax(axis=1), np.int64)

    def _warped(self, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        if self.temperature is not None:
            scores = scores / self.temperature
        if self.top_k is not None and self.top_k < scores.shape[1]:
            least = np.partition(scores, -self.top_k, axis=1)[:, -self.top_k, None]
            scores = np.where(scores < least, -np.inf, scores)
        if self.top_p is not None and self.top_p < 1:
            order = np.argsort(-scores, axis=1, kind="stable")
            ordered = _softmax(np.take_along_axis(scores, order, axis=1))
            before = ordered.cumsum(axis=1) - ordered  # of all that are more probable
            drop = np.empty_like(before, dtype=bool)
            np.put_along_axis(drop, order, before >= self.top_p, axis=1)
            scores = np.where(drop, -np.inf, scores)
        return scores


def _softmax(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    normalised: NDArray[np.float64] = powers / powers.sum(axis=1, keepdims=True)
    return normalised
