"""Policies for tests that keep other tokens for each KV head."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

import lethe_compile as lethe
from lethe_compile.policies import FullPolicy, LethePolicy, Policy, RoundState, register
from lethe_compile.policies.base import Counts

CONFIG = lethe.LetheConfig(policy="picky-per-head", decay=0.9, prune_threshold=16, prune_interval=4, page_size=4)


@register
class PickyHeads(Policy):
    """Each row of each layer keeps the last 6 tokens, and of the others every 2nd, 3rd or 4th, from another one on."""

    name = "picky-per-head"
    per_head = True

    @property
    def decay(self) -> float | None:
        return self.config.decay

    def least_tokens(self, prompts: Counts, new_tokens: int, windows: Sequence[int | None]) -> Counts:
        everything = super().least_tokens(prompts, new_tokens, windows)
        return np.minimum(everything, np.maximum(prompts, self.config.cap_floor))

    def round(self, state: RoundState, limit: Tensor | None = None) -> Tensor | None:
        layers, rows, _ = state.mass.shape
        device = state.mass.device
        row = torch.arange(rows, device=device)[:, None]
        step = 2 + (torch.arange(layers, device=device)[:, None, None] + row) % 3  # [L, R, 1]
        seen = state.visible()
        recent = state.position >= state.next_position[:, None] - 6
        chosen = seen & (recent | ((state.position + row // 3) % step == 0))
        keep = torch.where((state.length >= self.config.prune_threshold)[:, :, None], chosen, seen)
        if limit is not None:
            keep &= keep.flip(2).cumsum(2).flip(2) <= limit[:, :, None]  # the newest
        return keep


@register
class LetheHeads(LethePolicy):
    """Lethe with scores, thresholds and keep-sets of each KV head."""

    name = "lethe-per-head"
    per_head = True


@register
class FullHeads(FullPolicy):
    """Evicts nothing that a query could still see, with every KV head a row of the cache."""

    name = "full-per-head"
    per_head = True
