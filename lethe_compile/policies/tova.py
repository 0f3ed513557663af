"""TOVA: what the newest query attends to stays.

Source: Oren et al., *Transformers are Multi-State RNNs*, 2024, arXiv 2401.06104: at every step, the token with the
lowest attention of the last query, averaged over the heads of a layer, goes.

Ours differs: every `prune_interval` steps, as many go as came, all by the attention of one query, the last; sinks and,
unless `protect_prompt=False`, the prompt stay where the cap has room for them, of which the paper has neither
(`sink_tokens=0`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lethe_compile.policies.base import RoundState
from lethe_compile.policies.budgeted import RankedPolicy


class TovaPolicy(RankedPolicy):
    """Keep the tokens of the highest attention of the last query, and the newest token."""

    name = "tova"

    @property
    def decay(self) -> float | None:
        return 1.0

    @property
    def observation_window(self) -> int | None:
        return 1

    def scores(self, view: RoundState) -> Tensor:
        return view.mass

    def recent(self, target: Tensor) -> Tensor:
        return torch.ones_like(target)
