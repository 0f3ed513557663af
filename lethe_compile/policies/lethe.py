"""Lethe: layer- and time-adaptive pruning by decayed attention mass.

Source: Zeng et al., *Lethe*, AAAI 2026, arXiv 2511.06029. Ours, where the paper is silent or unsafe: scores and
keep-sets per sequence, prompt protection, hard caps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lethe_compile.config import MIN_RETAINED, LetheConfig
from lethe_compile.errors import ConfigError
from lethe_compile.kernels.ops import hoyer_sparsity, select
from lethe_compile.kernels.select.reference import select_shared, summed_mass
from lethe_compile.policies.base import NEVER, Counts, Policy, RoundState, trimmed_by_window


class LethePolicy(Policy):
    """Prune a layer of a row once its retained tokens reach its threshold, down to the breakpoint of their scores.

    No breakpoint (flat attention): nothing goes and that threshold doubles. A row that was considered is left alone
    until `prune_interval` new tokens came. Tokens hidden by a sliding window go in any round.

    Hard caps hold between rounds, one interval apart: a round that sees a cap about to be exceeded trims to one
    interval below it. Only a prompt longer than its cap exceeds it, until the round after the prefill. `max_tokens`
    caps each layer; `budget` caps a row's sum over layers, and where that is about to be exceeded, each layer is capped
    by its share (`share_budget`). The lower cap counts, and so does the limit of a round that comes for lack of pages.

    With `paper_literal`, the batch is treated as one row: its length is that of the longest active row.
    """

    name = "lethe"

    def __init__(self, config: LetheConfig) -> None:
        super().__init__(config)
        self._resume = torch.empty(0, 0, dtype=torch.int64)  # [L, R] retained tokens below which a row is left alone

    @property
    def decay(self) -> float | None:
        return self.config.decay

    @property
    def peak(self) -> bool:
        return self.config.score == "peak"

    @property
    def couples_rows(self) -> bool:
        return self.config.paper_literal

    def begin(self, num_layers: int, rows: int) -> None:
        floor, budget = self.config.cap_floor, self.config.budget
        if budget is not None and budget < num_layers * floor:
            raise ConfigError(
                f"budget={budget} is not allowed: must be None or an integer >= {num_layers * floor}"
                f" for {num_layers} layers of at least {floor} tokens (prune_interval + sink_tokens + {MIN_RETAINED})"
            )
        super().begin(num_layers, rows)
        self._thresholds.fill_(self.config.prune_threshold)
        self._resume = torch.zeros_like(self._thresholds)

    def least_tokens(self, prompts: Counts, new_tokens: int, windows: Sequence[int | None]) -> Counts:
        everything = super().least_tokens(prompts, new_tokens, windows)
        pruned = np.minimum(everything, np.maximum(prompts, self.config.cap_floor))
        return trimmed_by_window(pruned, prompts, windows, self.config.interval)

    def round(self, state: RoundState, limit: Tensor | None = None) -> Tensor | None:
        self._follow(state.mass.device)
        seen = state.visible()
        count = seen.sum(2)  # [L, R]
        size = self._sizes(count, state.active)
        starved = self._starved(size)
        due = self._due(size, starved, limit) & state.active
        if state.mass.is_cpu and not due.any():  # on a GPU, asking costs more than rows that exit at once
            return seen if (count < state.length).any() else None

        view = replace(state, mass=state.mass.masked_fill(~seen, 0), position=state.position.masked_fill(~seen, -1))
        self._sparsity = torch.where(due, self._measure(view, size), self._sparsity)
        chosen, broke = self._select(view, due, self._targets(size, starved, limit))
        keep = torch.where(due.unsqueeze(2), chosen, seen)
        if limit is None:
            # A cap may force a round below the threshold; doubling for that would never stop.
            flat = due & ~broke & (size >= self._thresholds)
            self._thresholds = torch.where(flat, 2 * self._thresholds, self._thresholds)
        kept = self._sizes(keep.sum(2), state.active)
        self._resume = torch.where(due, kept + self.config.interval, self._resume)
        return keep

    def _follow(self, device: torch.device) -> None:
        """Keep the state where the scores are; it moves once in a generation."""
        self._thresholds, self._resume = self._thresholds.to(device), self._resume.to(device)
        self._sparsity = self._sparsity.to(device)

    def _sizes(self, count: Tensor, active: Tensor) -> Tensor:
        """Tokens [L, R] that rows are judged by: their own, or in a literal batch those of the longest active row."""
        if not self.config.paper_literal:
            return count
        return (count * active).amax(1, keepdim=True).expand_as(count)

    def _starved(self, size: Tensor) -> Tensor:
        """[R] bool: rows whose layers together would exceed the budget before the next round."""
        if self.config.budget is None:
            return torch.zeros_like(size[0], dtype=torch.bool)
        return size.sum(0) + len(size) * self.config.interval > self.config.budget

    def _due(self, size: Tensor, starved: Tensor, limit: Tensor | None) -> Tensor:
        """[L, R] bool: where a threshold is reached, a cap would be exceeded before the next round, or a limit is."""
        due = (size >= torch.maximum(self._thresholds, self._resume)) | starved
        if self.config.max_tokens is not None:
            due = due | (size + self.config.interval > self.config.max_tokens)
        return due if limit is None else due | (size > limit)

    def _measure(self, view: RoundState, size: Tensor) -> Tensor:
        """Hoyer sparsity [L, R] of the scores; in a literal batch, that of their sum over rows."""
        if not self.config.paper_literal:
            return hoyer_sparsity(view.mass.flatten(0, 1), size.flatten()).view_as(size)
        layers = zip(view.mass, view.position, view.length, strict=True)
        total = torch.cat([summed_mass(*layer, view.active) for layer in layers])  # [L, N]
        return hoyer_sparsity(total, size.amax(1)).unsqueeze(1).expand_as(size)

    def _targets(self, size: Tensor, starved: Tensor, limit: Tensor | None) -> Tensor | None:
        """[L, R] tokens that this round may leave, so that one interval more stays within every cap; None: no caps."""
        config, target = self.config, size
        if config.max_tokens is None and config.budget is None and limit is None:
            return None
        if config.max_tokens is not None:
            target = target.clamp(max=config.max_tokens - config.interval)
        if config.budget is not None:
            share = share_budget(config.budget, 1 - self._sparsity.nan_to_num(0.0), config.cap_floor)
            target = torch.where(starved, torch.minimum(target, share - config.interval), target)
        return target if limit is None else torch.minimum(target, limit)

    def _select(self, view: RoundState, due: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor]:
        """Slots [L, R, N] that stay where a row is `due`, and where a breakpoint was found [L, R]."""
        config = self.config
        rule: dict[str, Any] = {
            "sparse_ratio": config.sparse_ratio,
            "segments": config.segments,
            "sink_tokens": config.sink_tokens,
            "recent_ratio": config.recent_ratio,
        }
        protected = view.prompt_length * config.protect_prompt  # [R]
        if config.paper_literal:
            return self._select_shared(view, target, protected, rule)
        keep, broke = select(
            view.mass.flatten(0, 1),
            view.position.flatten(0, 1),
            (view.length * due).flatten(),  # rows that are not due cost nothing
            protected_length=protected.expand_as(view.length).flatten(),
            cap=None if target is None else target.flatten(),
            **rule,
        )
        return keep.view_as(view.mass), broke.view_as(due)

    def _select_shared(
        self, view: RoundState, target: Tensor | None, protected: Tensor, rule: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """The paper's batch-wide choice, layer by layer: a mode for comparison."""
        if target is not None:  # [L, 1], as active rows are alike
            target = target.masked_fill(~view.active, NEVER).amin(1, keepdim=True)
        chosen = [
            select_shared(
                view.mass[layer],
                view.position[layer],
                view.length[layer],
                view.active,
                protected_length=protected,
                cap=None if target is None else target[layer],
                **rule,
            )
            for layer in range(len(view.windows))
        ]
        keep, broke = zip(*chosen, strict=True)
        return torch.stack(keep), torch.stack(broke)


def share_budget(budget: int, density: Tensor, floor: int) -> Tensor:
    """Caps [L, R] int64 of L layers that add up to at most `budget` tokens in each row.

    Every layer gets `floor`, and what is left goes to the layers in proportion to their `density` [L, R] in [0, 1]
    (paper: 1 - Hoyer sparsity), in equal parts where all densities are 0. Fractions of a token are dropped.
    `budget` must be at least L · floor.
    """
    weight = density.double()
    total = weight.sum(0)
    fraction = torch.where(total > 0, weight / total, 1 / len(density))
    return floor + ((budget - len(density) * floor) * fraction).floor().long()
