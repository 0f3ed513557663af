"""A round as a program: the policy's own code, and compaction, traced over contiguous caches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lethe_compile.kernels.compact import contiguous
from lethe_compile.policies.base import Policy, RoundState
from lethe_compile.policies.full import FullPolicy

INPUTS = ("active", "prompt_length", "next_position")


class RoundProgram(nn.Module):
    """``(active, prompt_length, next_position, *policy state, *cache) -> (*policy state, *cache)``.

    The first three are ``[rows]``, bool and int64; the policy's state is that of `Policy.state`, ``[caches, rows]``
    each; the cache is as `passes.contiguous.state_names` says. Rows that are not active are emptied.
    """

    def __init__(self, policy: Policy, windows: tuple[int | None, ...]) -> None:
        super().__init__()
        self.policy, self.windows = policy, windows
        self.state_names = tuple(policy.state())

    def forward(self, active: Tensor, prompt_length: Tensor, next_position: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        count = len(self.state_names)
        given, (*caches, position, mass, length) = rest[:count], rest[count:]
        slots = torch.arange(position.shape[2], device=position.device)
        beyond = slots >= length[:, :, None]  # [caches, rows, capacity]
        mass, position = mass.masked_fill(beyond, 0.0), position.masked_fill(beyond, -1)
        self.policy.adopt(dict(zip(self.state_names, given, strict=True)))
        keep = self.policy.round(
            RoundState(mass, position, length.long(), self.windows, prompt_length, next_position, active)
        )
        keep = ~beyond if keep is None else keep & ~beyond
        keep = keep & active[None, :, None]
        after = self.policy.state().values()
        return (*after, *self._compact(keep, caches, position, mass))

    def _compact(self, keep: Tensor, caches: list[Tensor], position: Tensor, mass: Tensor) -> list[Tensor]:
        shape = position.shape
        source = contiguous.sources(keep.flatten(0, 1))  # [caches * rows, capacity]
        position, mass = (contiguous.take(x.flatten(0, 1), source).view(shape) for x in (position, mass))
        by_cache = source.view(shape)
        taken = [contiguous.take(tensor, by_cache[index // 2]) for index, tensor in enumerate(caches)]
        return [*taken, position, mass, keep.sum(2, dtype=torch.int32)]

    def has_rounds(self) -> bool:
        """Whether a round can ever drop a token."""
        return not isinstance(self.policy, FullPolicy) or any(self.windows)
