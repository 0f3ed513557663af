"""What policies with hard caps share: `BudgetedPolicy` holds the caps, `RankedPolicy` trims to them by a score."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from lethe_compile.config import LetheConfig
from lethe_compile.errors import ConfigError
from lethe_compile.kernels.ops import hoyer_sparsity, top
from lethe_compile.policies.base import Counts, Policy, RoundState, column, trimmed_by_window
from lethe_compile.policies.budgets import Caps


class BudgetedPolicy(Policy):
    """A policy that heeds the config's caps, and the limit of a round that comes for lack of pages."""

    def __init__(self, config: LetheConfig) -> None:
        super().__init__(config)
        self._caps: Caps

    def begin(self, num_layers: int, rows: int, token_bytes: Sequence[int] | None = None) -> None:
        self._caps = Caps(self.config, num_layers, self.ceilings(num_layers), token_bytes)
        super().begin(num_layers, rows, token_bytes)

    def ceilings(self, num_layers: int) -> Sequence[int] | None:
        """[L] most tokens of each layer, `max_tokens` or less, as far as there are such caps."""
        return None if self.config.max_tokens is None else [self.config.max_tokens] * num_layers

    def least_tokens(self, prompts: Counts, new_tokens: int, windows: Sequence[int | None]) -> Counts:
        everything = super().least_tokens(prompts, new_tokens, windows)
        pruned = np.minimum(everything, np.maximum(prompts, self.config.cap_floor))
        return trimmed_by_window(pruned, prompts, windows, self.config.interval)

    def most_tokens(self, prompts: Counts, new_tokens: int, windows: Sequence[int | None]) -> Counts | None:
        if not self.config.capped:
            return None
        everything = trimmed_by_window(
            super().least_tokens(prompts, new_tokens, windows), prompts, windows, self.config.interval
        )
        return self._caps.most(everything, prompts)

    def _follow(self, device: torch.device) -> None:
        """Keep the state where the scores are; it moves once in a generation."""
        self._thresholds, self._sparsity = self._thresholds.to(device), self._sparsity.to(device)


class RankedPolicy(BudgetedPolicy):
    """Once a layer of a row is about to exceed its cap, trim it to one interval below, the best scores staying.

    A subclass says what a token is worth (`scores`), how many of the newest stay whatever their score (`recent`), and
    how layers share a `budget` (`weights`). Within the cap, tokens are taken in this order: sinks; the newest `recent`
    ones; the prompt, if `protect_prompt`; the rest; the latter two by score, and the newer of equals first.

    Where the published methods evict after every step, these evict every `prune_interval` steps, so that the cache
    breathes by one interval below its cap; and they choose for a layer as a whole, unless the class says `per_head`.

    Raises:
        ConfigError: neither `max_tokens` nor `budget` is set, without which nothing would ever be evicted.
    """

    def __init__(self, config: LetheConfig) -> None:
        super().__init__(config)
        if not config.capped:
            raise ConfigError(f"policy {self.name!r} evicts down to a cap, and there is none: set max_tokens or budget")

    @abstractmethod
    def scores(self, view: RoundState) -> Tensor:
        """[L, R, N] float32, finite, of any sign: the higher, the longer a token stays.

        In `view`, tokens that a sliding window hides are as slots without a token: mass 0, position -1.
        """

    def recent(self, target: Tensor) -> Tensor:
        """[L, R] newest tokens that stay in any case, of `target` [L, R] that may stay; at least one does."""
        return (target.double() * self.config.recent_ratio).floor().long()

    def weights(self, num_layers: int) -> Sequence[float]:
        """[L], each >= 0: in proportion to these, layers share a budget, each beyond the least that it must have."""
        return [1.0] * num_layers

    def round(self, state: RoundState, limit: Tensor | None = None) -> Tensor | None:
        self._follow(state.mass.device)
        seen = state.visible()
        size = seen.sum(2)  # [L, R]
        weight = self._weight(size)
        starved = self._caps.starved(size, state)
        due = self._caps.due(size, starved, limit) & state.active
        if limit is None:
            shares = self._caps.shares(weight, state)
            assert shares is not None, "a ranked policy has a cap"
            self._thresholds = shares - self.config.interval + 1
        if state.mass.is_cpu and not due.any():  # on a GPU, asking costs more than choosing
            return seen if (size < state.length).any() else None

        view = replace(state, mass=state.mass.masked_fill(~seen, 0), position=state.position.masked_fill(~seen, -1))
        if self.decay is not None:
            sparsity = hoyer_sparsity(view.mass.flatten(0, 1), size.flatten()).view_as(size)
            self._sparsity = torch.where(due, sparsity, self._sparsity)
        target = self._caps.targets(size, starved, limit, weight, state)
        assert target is not None, "a ranked policy has a cap"
        return torch.where(due.unsqueeze(2), self._top(view, target), seen)

    def _weight(self, size: Tensor) -> Tensor:
        return column(tuple(self.weights(len(size))), size.device, torch.float64).expand(size.shape)

    def _top(self, view: RoundState, target: Tensor) -> Tensor:
        protected = view.prompt_length * self.config.protect_prompt  # [R]
        keep = top(
            self.scores(view).flatten(0, 1),
            view.position.flatten(0, 1),
            view.length.flatten(),
            cap=target.flatten(),
            recent=self.recent(target).flatten(),
            sink_tokens=self.config.sink_tokens,
            protected_length=protected.expand_as(target).flatten(),
        )
        return keep.view_as(view.mass)


class ObservedPolicy(RankedPolicy):
    """Scores are what the newest `options.window` queries attended to; their own tokens stay, up to half of the cap."""

    @property
    def decay(self) -> float | None:
        return 1.0

    @property
    def observation_window(self) -> int | None:
        window: int = self.options.window
        return window

    def recent(self, target: Tensor) -> Tensor:
        return torch.clamp(target // 2, max=self.options.window)
