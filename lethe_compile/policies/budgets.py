"""Hard caps: `max_tokens` of each layer and `budget` of each sequence, in tokens, whichever way they were given."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lethe_compile.config import MIN_RETAINED, LetheConfig, parse_bytes
from lethe_compile.errors import ConfigError
from lethe_compile.policies.base import Counts, RoundState, column


class Caps:
    """The caps of one generation of L layers. They hold between rounds: a round that sees one about to be exceeded
    before the next trims to one interval below it.

    A budget has a unit: tokens, where each costs 1 in whatever layer; or bytes, where a token costs its layer's.

    Args:
        ceilings: [L] caps of each layer; None for none.
        token_bytes: of one token in each layer, all its KV heads together; None where nobody knows.

    Raises:
        ConfigError: the budget is less than the least that each layer must have, or in bytes and nobody says how many
            a token takes.
    """

    def __init__(
        self,
        config: LetheConfig,
        num_layers: int,
        ceilings: Sequence[int] | None = None,
        token_bytes: Sequence[int] | None = None,
    ) -> None:
        self.config, self._ceilings = config, ceilings
        self._cost: Sequence[int] = [1] * num_layers
        self._amount: int | None = None  # in the budget's unit; None where it is a share of the full cache
        budget = config.budget
        if isinstance(budget, str):
            if token_bytes is None:
                raise ConfigError(f"budget={budget!r} is in bytes, and nothing says what a token takes: give tokens")
            self._cost, self._amount = token_bytes, parse_bytes(budget)
        elif isinstance(budget, int):
            self._amount = budget
        elif token_bytes is not None:
            self._cost = token_bytes
        least = config.cap_floor * sum(self._cost)
        if self._amount is not None and self._amount < least:
            unit = f"{least} bytes or more" if isinstance(budget, str) else f"an integer >= {least}"
            raise ConfigError(
                f"budget={budget!r} is not allowed: must be None or {unit} for {num_layers} layers of at least"
                f" {config.cap_floor} tokens (prune_interval + sink_tokens + {MIN_RETAINED})"
            )

    def most(self, everything: Counts, prompts: Counts) -> Counts:
        """[L, R] tokens that the caps let each layer and row hold of `everything` [L, R], `prompts` [R] of it prompt; a
        budget in equal parts."""
        held, cost = everything, np.array(self._cost)[:, None]
        if self._ceilings is not None:
            held = np.minimum(held, np.array(self._ceilings)[:, None])
        if self.config.budget is None:
            return held
        if self._amount is not None:
            amount = np.full(everything.shape[1], self._amount)
        else:
            assert isinstance(self.config.budget, float)
            share = ((everything * cost).sum(0) * self.config.budget).astype(np.int64)
            least = prompts * self.config.protect_prompt + self.config.cap_floor
            amount = np.maximum(share, least * int(cost.sum()))
        each: Counts = np.minimum(held, -(-amount // int(cost.sum())))
        return each

    def starved(self, size: Tensor, state: RoundState) -> Tensor:
        """[R] bool: rows whose layers, of `size` [L, R] tokens, would exceed the budget before the next round."""
        if self.config.budget is None:
            return torch.zeros_like(size[0], dtype=torch.bool)
        cost = self._costs(size)
        return ((size + self.config.interval) * cost).sum(0) > self._budget(state)

    def due(self, size: Tensor, starved: Tensor, limit: Tensor | None) -> Tensor:
        """[L, R] bool: where a cap would be exceeded before the next round, or `limit` [L, R] is now."""
        due = starved.expand_as(size)
        if self._ceilings is not None:
            due = due | (size + self.config.interval > column(tuple(self._ceilings), size.device))
        return due if limit is None else due | (size > limit)

    def targets(
        self, size: Tensor, starved: Tensor, limit: Tensor | None, weight: Tensor, state: RoundState
    ) -> Tensor | None:
        """[L, R] tokens that this round may leave, so that one interval more stays within every cap; None: no caps.

        Layers of a starved row share its budget by their `weight` [L, R] >= 0.
        """
        config, target = self.config, size
        if self._ceilings is None and config.budget is None and limit is None:
            return None
        if self._ceilings is not None:
            target = torch.minimum(target, column(tuple(self._ceilings), size.device) - config.interval)
        if config.budget is not None:
            share = share_budget(self._budget(state), weight, config.cap_floor, self._costs(size))
            target = torch.where(starved, torch.minimum(target, share - config.interval), target)
        return target if limit is None else torch.minimum(target, limit)

    def shares(self, weight: Tensor, state: RoundState) -> Tensor | None:
        """[L, R] tokens that each layer may hold before the next round, by `weight` [L, R]; None: there are no caps."""
        config, caps = self.config, None
        if config.budget is not None:
            caps = share_budget(self._budget(state), weight, config.cap_floor, self._costs(weight))
        if self._ceilings is None:
            return caps
        most = column(tuple(self._ceilings), weight.device).expand(weight.shape)
        return most if caps is None else torch.minimum(caps, most)

    def _costs(self, like: Tensor) -> Tensor:
        return column(tuple(self._cost), like.device)

    def _budget(self, state: RoundState) -> Tensor:
        """[R] int64 of the budget's unit, as it will be when the next round comes."""
        if self._amount is not None:
            return torch.full_like(state.next_position, self._amount)
        share = self.config.budget
        assert isinstance(share, float)
        seen = state.next_position + self.config.interval  # [R]
        costs, windows = self._costs(seen), state.window_sizes()
        full = torch.minimum(seen, windows) * costs  # [L, R]
        protected = torch.minimum(state.prompt_length * self.config.protect_prompt, windows)  # [L, R]
        least = ((protected + self.config.cap_floor) * costs).sum(0)
        return torch.maximum((full.sum(0).double() * share).floor().long(), least)


def share_budget(budget: Tensor | int, weight: Tensor, floor: int, cost: Tensor | None = None) -> Tensor:
    """Caps [L, R] int64 of L layers that together cost at most `budget` [R] in each row.

    Every layer gets `floor`, and what is left goes to the layers in proportion to their `weight` [L, R] >= 0 (Lethe:
    density, 1 - Hoyer sparsity), in equal parts where all weights are 0. Fractions of a token are dropped. A token of a
    layer costs `cost` [L, 1], by default 1; `budget` must be at least floor · Σ cost.
    """
    cost = torch.ones_like(weight[:, :1], dtype=torch.int64) if cost is None else cost
    share = weight.double()
    share = torch.where(share.sum(0) > 0, share, 1.0)
    spare = budget - floor * cost.sum()
    return floor + (spare * (share / (share * cost).sum(0))).floor().long()
