"""Random eviction: the baseline that every selector has to beat.

The prompt stays where the cap has room for it, and so do sinks and the newest `recent_ratio`; of the rest, who goes is
drawn anew in every round. Draws are a hash of seed, layer, position and time: the same on every device, for a sequence
alone or in a batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lethe_compile.policies.base import RoundState
from lethe_compile.policies.budgeted import RankedPolicy
from lethe_compile.settings import Settings, integer, setting

_GOLDEN, _MIX1, _MIX2 = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15  # splitmix64's, as int64


@dataclass(frozen=True)
class RandomOptions(Settings):
    seed: int = setting(0, integer(0, 2**31 - 1))
    """Another seed draws otherwise; the same one draws the same again."""


class RandomPolicy(RankedPolicy):
    """Keep sinks, prompt and newest tokens, and any of the others. Steps run without attention mass."""

    name = "random"
    Options = RandomOptions
    options: RandomOptions

    def scores(self, view: RoundState) -> Tensor:
        layer = torch.arange(len(view.windows), device=view.position.device)[:, None, None]
        mixed = _mix(_mix(_mix(layer + (self.options.seed << 32)) + view.next_position[:, None]) + view.position)
        return ((mixed >> 40) & 0xFFFFFF).float()  # 24 bits: exact


def _mix(x: Tensor) -> Tensor:
    """splitmix64 of int64 values: Steele et al., *Fast Splittable Pseudorandom Number Generators*, OOPSLA 2014."""
    x = x + _GOLDEN
    x = (x ^ _shifted(x, 30)) * _MIX1
    x = (x ^ _shifted(x, 27)) * _MIX2
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right: torch's carries the sign along."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
