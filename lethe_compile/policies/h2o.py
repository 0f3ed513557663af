"""H2O: heavy hitters by accumulated attention, half of the cache; the other half is the newest tokens.

Source: Zhang et al., *H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models*,
NeurIPS 2023, arXiv 2306.14048, algorithm 1: a token's score is the sum of the attention probabilities that all queries
so far gave it, prompt queries included; the lowest of all but the recent tokens goes.

Ours differs: the lowest go together every `prune_interval` steps, not one a step; query heads of one KV head add up, as
grouped-query models need; sinks and, unless `protect_prompt=False`, the prompt stay where the cap has room for them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lethe_compile.policies.base import RoundState
from lethe_compile.policies.budgeted import RankedPolicy
from lethe_compile.settings import SHARE, Settings, setting


@dataclass(frozen=True)
class H2OOptions(Settings):
    recent: float = setting(0.5, SHARE)
    """Share of the cap for the newest tokens. Paper: half."""


class H2OPolicy(RankedPolicy):
    """Keep the tokens of the highest attention since they came, and the newest; every head chooses for itself."""

    name = "h2o"
    per_head: ClassVar[bool] = True
    Options = H2OOptions
    options: H2OOptions

    @property
    def decay(self) -> float | None:
        return 1.0

    def scores(self, view: RoundState) -> Tensor:
        return view.mass

    def recent(self, target: Tensor) -> Tensor:
        return (target.double() * self.options.recent).floor().long()
