"""SnapKV: attention of an observation window's queries, pooled over neighbouring tokens.

Source: Li et al., *SnapKV: LLM Knows What You are Looking for Before Generation*, NeurIPS 2024, arXiv 2404.14469: of
the prompt's tokens before the window, those stay that the window's queries attended to most, after pooling, which keeps
what surrounds an important token; the window stays whole. Window 32, pooling over 7 in the paper's long-context runs.

Ours differs: the paper compresses the prompt once, and what is generated stays; here every round does the same again,
with the newest queries as the window (at most `prune_interval` of them). A layer chooses as a whole, from the sum over
its heads; neighbours are those in the cache, so that what was evicted between two tokens does not part them; sinks and,
unless `protect_prompt=False`, the prompt stay where the cap has room, which in the paper is exactly what is compressed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lethe_compile.policies.base import RoundState
from lethe_compile.policies.budgeted import ObservedPolicy
from lethe_compile.policies.pooling import ODD, pooled
from lethe_compile.settings import Settings, integer, one_of, setting


@dataclass(frozen=True)
class SnapKVOptions(Settings):
    window: int = setting(32, integer(1))
    """Queries that are observed, the newest; their tokens stay in any case, as far as half the cap goes."""

    kernel: int = setting(7, ODD)
    """Neighbouring tokens that are pooled; 1 for none."""

    pooling: str = setting("avg", one_of("avg", "max"))
    """What a token gets of its neighbours' attention: the mean, or the most."""


class SnapKVPolicy(ObservedPolicy):
    """Keep the tokens that the newest queries attend to, with their neighbours, and those queries' own tokens."""

    name = "snapkv"
    Options = SnapKVOptions
    options: SnapKVOptions

    def scores(self, view: RoundState) -> Tensor:
        """Pooled attention; the window's own tokens have their own alone, and lend it to nobody."""
        newest = view.position >= (view.next_position - self.options.window).unsqueeze(1)
        around = pooled(view.mass.masked_fill(newest, 0), self.options.kernel, self.options.pooling)
        return torch.where(newest, view.mass, around)
