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
        keep, position, mass = self._keep(active, prompt_length, next_position, given, position, mass, length)
        shape = position.shape
        source = contiguous.sources(keep.flatten(0, 1))  # [caches * rows, capacity]
        position, mass = (contiguous.take(x.flatten(0, 1), source).view(shape) for x in (position, mass))
        by_cache = source.view(shape)
        taken = [contiguous.take(tensor, by_cache[index // 2]) for index, tensor in enumerate(caches)]
        return (*self.policy.state().values(), *taken, position, mass, keep.sum(2, dtype=torch.int32))

    def _keep(
        self,
        active: Tensor,
        prompt_length: Tensor,
        next_position: Tensor,
        given: tuple[Tensor, ...],
        position: Tensor,
        mass: Tensor,
        length: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What stays, positions and masses, all ``[caches, rows, capacity]``; the policy adopts its `given` state."""
        slots = torch.arange(position.shape[2], device=position.device)
        beyond = slots >= length[:, :, None]  # [caches, rows, capacity]
        mass, position = mass.masked_fill(beyond, 0.0), position.masked_fill(beyond, -1)
        self.policy.adopt(dict(zip(self.state_names, given, strict=True)))
        keep = self.policy.round(
            RoundState(mass, position, length.long(), self.windows, prompt_length, next_position, active)
        )
        keep = ~beyond if keep is None else keep & ~beyond
        return keep & active[None, :, None], position, mass

    def has_rounds(self) -> bool:
        """Whether a round can ever drop a token."""
        return not isinstance(self.policy, FullPolicy) or any(self.windows)


class PagedRoundProgram(RoundProgram):
    """A `RoundProgram` over the pages of `passes.kernel_step`: those of a row are one behind the other.

    Cache i is ``k_i, v_i [rows, n, kv_heads, page, dim]``, ``position_i, mass_i [rows, n, page]``, ``length_i [rows]``;
    where `latent` says that values are stored inside of keys, there is no ``v_i``.
    """

    def __init__(self, policy: Policy, windows: tuple[int | None, ...], latent: tuple[bool, ...]) -> None:
        super().__init__(policy, windows)
        self.latent = latent

    def forward(self, active: Tensor, prompt_length: Tensor, next_position: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        count = len(self.state_names)
        given, left = rest[:count], list(rest[count:])
        caches = [[left.pop(0) for _ in range(4 if latent else 5)] for latent in self.latent]
        position, mass, length = (torch.stack(parts) for parts in zip(*(one[-3:] for one in caches), strict=True))
        shape = position.shape[1:]  # rows, n, page
        keep, position, mass = self._keep(
            active, prompt_length, next_position, given, position.flatten(2), mass.flatten(2), length
        )
        taken: list[Tensor] = []
        for index, (*pools, _, _, _) in enumerate(caches):
            source = contiguous.sources(keep[index])  # [rows, slots]
            taken += [_take_pages(pages, source) for pages in pools]
            taken += [contiguous.take(x[index], source).view(shape) for x in (position, mass)]
            taken.append(keep[index].sum(1, dtype=torch.int32))
        return (*self.policy.state().values(), *taken)


def _take_pages(pages: Tensor, source: Tensor) -> Tensor:
    """``[rows, n, kv_heads, page, dim]`` with the slots that `source` [rows, n * page] names, in their order."""
    rows, count, heads, page, dim = pages.shape
    by_slot = pages.transpose(2, 3).reshape(rows, count * page, heads, dim)
    index = source[:, :, None, None].expand(-1, -1, heads, dim)
    return by_slot.gather(1, index).view(rows, count, page, heads, dim).transpose(2, 3).contiguous()
