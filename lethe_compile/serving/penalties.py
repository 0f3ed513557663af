"""OpenAI's penalties of tokens by how often they were generated."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class CountPenalty:
    """A logits processor: ``score - presence * (count > 0) - frequency * count``, counts of the generated text only.

    https://platform.openai.com/docs/api-reference/completions (transformers has penalties of prompt and text together).
    """

    def __init__(self, presence: float, frequency: float) -> None:
        self.presence, self.frequency = presence, frequency
        self._prompt: int | None = None

    def __call__(self, ids: Tensor, scores: Tensor) -> Any:  # [1, T], [1, V]
        if self._prompt is None:
            self._prompt = ids.shape[1]
        counts = torch.zeros_like(scores)
        text = ids[:, self._prompt :]
        counts.scatter_add_(1, text, torch.ones(text.shape, dtype=scores.dtype, device=scores.device))
        return scores - self.presence * (counts > 0) - self.frequency * counts
