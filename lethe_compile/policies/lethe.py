"""Lethe: layer- and time-adaptive pruning by decayed attention mass.

Source: Zeng et al., *Lethe*, AAAI 2026, arXiv 2511.06029. Ours, where the paper is silent or unsafe: scores and
keep-sets per sequence, prompt protection, hard caps. Each part can be switched off, to see what it is worth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lethe_compile.config import LetheConfig
from lethe_compile.errors import ConfigError
from lethe_compile.kernels.ops import hoyer_sparsity, select, select_shared, top
from lethe_compile.kernels.select.reference import summed_mass
from lethe_compile.policies.base import NEVER, RoundState
from lethe_compile.policies.budgeted import BudgetedPolicy
from lethe_compile.settings import BOOL, Settings, one_of, setting


@dataclass(frozen=True)
class LetheOptions(Settings):
    """Parts of the method, each of which can be switched off."""

    breakpoint: bool = setting(True, BOOL)
    """Layers prune themselves at the breakpoint of their scores. False: nothing but `max_tokens` and `budget`, of which
    there must be one, prunes."""

    choice: str = setting("score", one_of("score", "recent"))
    """Which tokens fill what a layer keeps: "score", those of the highest decayed attention (RASR); "recent", newest.
    How many a layer keeps is told by its scores either way."""

    shares: str = setting("density", one_of("density", "uniform"))
    """How layers share a `budget`: "density", in proportion to their scores' 1 - Hoyer sparsity; "uniform", equally."""


class LethePolicy(BudgetedPolicy):
    """Prune a layer of a row once its retained tokens reach its threshold, down to the breakpoint of their scores.

    No breakpoint (flat attention): nothing goes and that threshold doubles. A row that was considered is left alone
    until `prune_interval` new tokens came. Tokens hidden by a sliding window go in any round.

    Hard caps hold between rounds, one interval apart: a round that sees a cap about to be exceeded trims to one
    interval below it. Only a prompt longer than its cap exceeds it, until the round after the prefill. `max_tokens`
    caps each layer; `budget` caps a row's sum over layers, and where that is about to be exceeded, each layer is capped
    by its share (`share_budget`). The lower cap counts, and so does the limit of a round that comes for lack of pages.

    With `paper_literal`, the batch is treated as one row: its length is that of the longest active row.

    Raises:
        ConfigError: no breakpoint and no cap either, so that nothing would ever be evicted.
    """

    name = "lethe"
    Options = LetheOptions
    options: LetheOptions

    def __init__(self, config: LetheConfig) -> None:
        super().__init__(config)
        self._resume = torch.empty(0, 0, dtype=torch.int64)  # [L, R] retained tokens below which a row is left alone
        if not (self.options.breakpoint or config.capped):
            raise ConfigError(f"policy {self.name!r} without a breakpoint needs a cap: set max_tokens or budget")

    @property
    def decay(self) -> float | None:
        return self.config.decay

    @property
    def peak(self) -> bool:
        return self.config.score == "peak"

    @property
    def couples_rows(self) -> bool:
        return self.config.paper_literal

    def begin(self, num_layers: int, rows: int, token_bytes: Sequence[int] | None = None) -> None:
        super().begin(num_layers, rows, token_bytes)
        if self.options.breakpoint:
            self._thresholds.fill_(self.config.prune_threshold)
        self._resume = torch.zeros_like(self._thresholds)

    def round(self, state: RoundState, limit: Tensor | None = None) -> Tensor | None:
        self._follow(state.mass.device)
        seen = state.visible()
        count = seen.sum(2)  # [L, R]
        size = self._sizes(count, state.active)
        starved = self._caps.starved(size, state)
        considered = size >= torch.maximum(self._thresholds, self._resume)
        due = (considered | self._caps.due(size, starved, limit)) & state.active
        if self._asks(state.mass) and not due.any():  # on a GPU, that costs more than rows that exit at once
            return seen if (count < state.length).any() else None

        view = replace(state, mass=state.mass.masked_fill(~seen, 0), position=state.position.masked_fill(~seen, -1))
        self._sparsity = torch.where(due, self._measure(view, size), self._sparsity)
        target = self._caps.targets(size, starved, limit, self._weight(), state)
        chosen, broke = self._select(view, due, target)
        if self.options.choice == "recent":
            chosen = self._newest(view, chosen.sum(2))
        keep = seen & (chosen | ~due.unsqueeze(2))
        if limit is None:
            # A cap may force a round below the threshold; doubling for that would never stop.
            flat = due & ~broke & (size >= self._thresholds)
            self._thresholds = torch.where(flat, 2 * self._thresholds, self._thresholds)
        kept = self._sizes(keep.sum(2), state.active)
        self._resume = torch.where(due, kept + self.config.interval, self._resume)
        return keep

    def state(self) -> dict[str, Tensor]:
        return {**super().state(), "resume": self._resume}

    def adopt(self, state: Mapping[str, Tensor]) -> None:
        super().adopt(state)
        self._resume = state["resume"]

    def _follow(self, device: torch.device) -> None:
        """Keep the state where the scores are; it moves once in a generation."""
        super()._follow(device)
        self._resume = self._resume.to(device)

    def _sizes(self, count: Tensor, active: Tensor) -> Tensor:
        """Tokens [L, R] that rows are judged by: their own, or in a literal batch those of the longest active row."""
        if not self.config.paper_literal:
            return count
        return (count * active).amax(1, keepdim=True).expand_as(count)

    def _weight(self) -> Tensor:
        """[L, R] by which layers share a budget."""
        if self.options.shares == "uniform":
            return torch.ones_like(self._sparsity)
        return 1 - self._sparsity.nan_to_num(0.0)

    def _measure(self, view: RoundState, size: Tensor) -> Tensor:
        """Hoyer sparsity [L, R] of the scores; in a literal batch, that of their sum over rows."""
        if not self.config.paper_literal:
            return hoyer_sparsity(view.mass.flatten(0, 1), size.flatten()).view_as(size)
        layers = zip(view.mass, view.position, view.length, strict=True)
        total = torch.cat([summed_mass(*layer, view.active) for layer in layers])  # [L, N]
        return hoyer_sparsity(total, size.amax(1)).unsqueeze(1).expand_as(size)

    def _select(self, view: RoundState, due: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor]:
        """Slots [L, R, N] that stay where a row is `due`, and where a breakpoint was found [L, R]."""
        config = self.config
        rule: dict[str, Any] = {
            "sparse_ratio": config.sparse_ratio if self.options.breakpoint else float("inf"),  # nothing falls so low
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

    def _newest(self, view: RoundState, count: Tensor) -> Tensor:
        """Slots [L, R, N]: as many as `count` [L, R], sinks and prompt as they would stay, then the newest."""
        protected = view.prompt_length * self.config.protect_prompt
        keep = top(
            view.position.flatten(0, 1).float(),
            view.position.flatten(0, 1),
            view.length.flatten(),
            cap=count.flatten(),
            recent=(count.double() * self.config.recent_ratio).floor().long().flatten(),
            sink_tokens=self.config.sink_tokens,
            protected_length=protected.expand_as(count).flatten(),
        )
        return keep.view_as(view.mass)
