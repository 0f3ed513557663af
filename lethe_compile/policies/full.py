"""The policy that evicts nothing a query could still see: the baseline, and the mode for exactness."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lethe_compile.policies.base import Counts, Policy, RoundState, trimmed_by_window


class FullPolicy(Policy):
    """Keep everything but the tokens that a layer's sliding window has hidden for good; lossless."""

    name = "full"

    def least_tokens(self, prompts: Counts, new_tokens: int, windows: Sequence[int | None]) -> Counts:
        everything = super().least_tokens(prompts, new_tokens, windows)
        return trimmed_by_window(everything, prompts, windows, self.config.interval)

    def round(self, state: RoundState, limit: Tensor | None = None) -> Tensor | None:
        if not any(state.windows):
            return None
        seen = state.visible()
        if self._asks(seen) and torch.equal(seen.sum(2), state.length):  # on a GPU, that costs more than an idle launch
            return None
        return seen
