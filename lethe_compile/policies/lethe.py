"""Lethe: layer- and time-adaptive pruning by decayed attention mass.

Source: Zeng et al., *Lethe*, AAAI 2026, arXiv 2511.06029. Ours, where the paper is silent or unsafe: scores and
keep-sets per sequence, prompt protection, hard caps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lethe_compile.config import MIN_RETAINED, LetheConfig
from lethe_compile.errors import ConfigError
from lethe_compile.kernels.select.reference import hoyer_sparsity, select, select_shared, summed_mass
from lethe_compile.policies.base import NEVER, LayerState, Policy, Selection


class LethePolicy(Policy):
    """Prune a layer of a row once its retained tokens reach its threshold, down to the breakpoint of their scores.

    No breakpoint (flat attention): nothing goes and that threshold doubles. A row that was considered is left alone
    until `prune_interval` new tokens came. Tokens hidden by a sliding window go in any round.

    Hard caps hold between rounds, one interval apart: a round that sees a cap about to be exceeded trims to one
    interval below it. Only a prompt longer than its cap exceeds it, until the round after the prefill. `max_tokens`
    caps each layer; `budget` caps a row's sum over layers, and where that is about to be exceeded, each layer is capped
    by its share (`share_budget`). The lower cap counts.

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

    def round(self, layers: Sequence[LayerState]) -> list[Selection | None]:
        sites, active, device = [state.layer for state in layers], layers[0].active, layers[0].active.device
        self._thresholds, self._resume = self._thresholds.to(device), self._resume.to(device)
        self._sparsity = self._sparsity.to(device)

        views = [_without_hidden(state) for state in layers]
        count = torch.stack([(view.position >= 0).sum(1) for view in views])  # [L, R]
        hiding = (count < torch.stack([state.length for state in layers])).any(1)
        size = self._sizes(count, active)
        pressed = self._pressed(size)
        due = self._due(sites, size, pressed) & active
        considered, trimmed = torch.stack([due.any(1), hiding]).tolist()  # the round's one host sync

        for i, view in enumerate(views):
            if considered[i]:
                measured = self._measure(view, size[i])
                self._sparsity[view.layer] = torch.where(due[i], measured, self._sparsity[view.layer])
        targets = self._targets(sites, size, pressed)
        selections: list[Selection | None] = []
        for i, (state, view) in enumerate(zip(layers, views, strict=True)):
            if considered[i]:
                target = None if targets is None else targets[i]
                selections.append(Selection.of(state, self._prune(view, due[i], size[i], target)))
            else:
                selections.append(Selection.of(state, view.position >= 0) if trimmed[i] else None)
        return selections

    def _sizes(self, count: Tensor, active: Tensor) -> Tensor:
        """Tokens [L, R] that rows are judged by: their own, or in a literal batch those of the longest active row."""
        if not self.config.paper_literal:
            return count
        return (count * active).amax(1, keepdim=True).expand_as(count)

    def _pressed(self, size: Tensor) -> Tensor:
        """[R] bool: rows whose layers together would exceed the budget before the next round."""
        if self.config.budget is None:
            return torch.zeros_like(size[0], dtype=torch.bool)
        return size.sum(0) + len(size) * self.config.prune_interval > self.config.budget

    def _due(self, sites: list[int], size: Tensor, pressed: Tensor) -> Tensor:
        """[L, R] bool: where a threshold is reached, or a cap would be exceeded before the next round."""
        due = (size >= torch.maximum(self._thresholds[sites], self._resume[sites])) | pressed
        if self.config.max_tokens is not None:
            due = due | (size + self.config.prune_interval > self.config.max_tokens)
        return due

    def _measure(self, view: LayerState, size: Tensor) -> Tensor:
        """Hoyer sparsity [R] of a layer's scores; in a literal batch, that of their sum over rows."""
        if self.config.paper_literal:
            total = summed_mass(view.mass, view.position, view.length, view.active)
            return hoyer_sparsity(total, size.amax(0, keepdim=True)).expand_as(size)
        return hoyer_sparsity(view.mass, size)

    def _targets(self, sites: list[int], size: Tensor, pressed: Tensor) -> Tensor | None:
        """[L, R] tokens that this round may leave, so that one interval more stays within every cap; None: no caps."""
        config, target = self.config, size
        if config.max_tokens is None and config.budget is None:
            return None
        if config.max_tokens is not None:
            target = target.clamp(max=config.max_tokens - config.prune_interval)
        if config.budget is not None:
            density = 1 - self._sparsity[sites].nan_to_num(0.0)
            share = share_budget(config.budget, density, config.cap_floor)
            target = torch.where(pressed, torch.minimum(target, share - config.prune_interval), target)
        return target

    def _prune(self, view: LayerState, due: Tensor, size: Tensor, target: Tensor | None) -> Tensor:
        """Slots [R, N] that stay in rows that are `due`; the others keep all they can see. Updates the thresholds."""
        config = self.config
        rule: dict[str, Any] = {
            "sparse_ratio": config.sparse_ratio,
            "segments": config.segments,
            "sink_tokens": config.sink_tokens,
            "recent_ratio": config.recent_ratio,
            "protected_length": view.prompt_length * config.protect_prompt,
        }
        if config.paper_literal:
            if target is not None:
                target = target.masked_fill(~view.active, NEVER).amin(0, keepdim=True)  # [1], active rows are alike
            keep, broke = select_shared(view.mass, view.position, view.length, view.active, cap=target, **rule)
        else:
            keep, broke = select(view.mass, view.position, view.length, cap=target, **rule)
        keep = torch.where(due.unsqueeze(1), keep, view.position >= 0)

        threshold, resume = self._thresholds[view.layer], self._resume[view.layer]
        kept = self._sizes(keep.sum(1).unsqueeze(0), view.active)[0]
        # A cap may force a round below the threshold; doubling for that would never stop.
        flat = due & ~broke & (size >= threshold)
        self._thresholds[view.layer] = torch.where(flat, 2 * threshold, threshold)
        self._resume[view.layer] = torch.where(due, kept + config.prune_interval, resume)
        return keep


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


def _without_hidden(state: LayerState) -> LayerState:
    """`state` without the tokens that its sliding window has hidden for good."""
    if state.window is None:
        return state
    seen = state.visible()
    return replace(state, mass=state.mass.masked_fill(~seen, 0), position=state.position.masked_fill(~seen, -1))
