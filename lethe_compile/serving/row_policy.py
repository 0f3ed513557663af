"""A policy whose rows begin, move, and are asked one by one, where a generation has all of them in step."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from lethe_compile.cache import Rows
from lethe_compile.errors import ConfigError
from lethe_compile.policies.base import Policy, RoundState


class RowPolicy:
    """A policy of R rows, of which each has its own rounds; its state is that of `Policy.state`, column by column.

    Args:
        policy: copied, so that its own generation stays untouched.
        layers, rows, heads: sizes; `heads` rows belong to one sequence.
        token_bytes: as in `Policy.begin`.

    Raises:
        ConfigError: what a row keeps depends on the others, or the config cannot serve these layers.
    """

    def __init__(
        self, policy: Policy, layers: int, rows: int, heads: int, token_bytes: Sequence[int], device: torch.device
    ) -> None:
        if policy.couples_rows:
            raise ConfigError(
                f"policy {policy.name!r} with these settings (paper_literal) lets the rows of a batch decide together"
                " what each keeps: a request would depend on its neighbours. Set paper_literal=False"
            )
        self.policy = copy.deepcopy(policy)
        self.policy.begin(layers, heads, token_bytes)
        self._fresh = {name: value.to(device) for name, value in self.policy.state().items()}  # [layers, heads]
        self._state = {name: value.repeat(1, rows // heads) for name, value in self._fresh.items()}

    def begin(self, rows: slice) -> None:
        """The rows of one sequence have seen nothing."""
        for name, value in self._state.items():
            value[:, rows] = self._fresh[name]

    def move(self, source: slice, target: slice) -> None:
        """Rows `target` go on where rows `source` are."""
        for value in self._state.values():
            value[:, target] = value[:, source].clone()

    def round(self, rows: Rows, state: RoundState, limit: Tensor | None = None) -> Tensor | None:
        """`Policy.round` of some rows, which `state` and `limit` are of."""
        self.policy.adopt({name: value.index_select(1, rows.on_device) for name, value in self._state.items()})
        keep = self.policy.round(state, limit)
        for name, value in self.policy.state().items():
            whole = self._state[name]
            whole.index_copy_(1, rows.on_device, value.to(whole.device).expand(len(whole), len(rows.on_host)))
        return keep
