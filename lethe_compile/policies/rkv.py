"""R-KV: what is important and not redundant stays.

Source: Cai et al., *R-KV: Redundancy-aware KV Cache Compression for Reasoning Models*, NeurIPS 2025, arXiv 2505.24133.
A token's value is ``λ · I - (1 - λ) · R``. I is its attention from the newest α queries, the most among its neighbours;
R the softmax over tokens of the mean cosine similarity of its key to all others, where for every token the newest of
those that resemble it (similarity above T) does not count, so that of alike tokens the newest stays. α = 8, λ = 0.1.

Ours differs: a layer chooses as a whole: I is the sum over its heads, scaled to add up to 1 over tokens as one head's
does, and R the mean over its KV heads; the choice comes every `prune_interval` steps, the paper's every 128; sinks and,
unless `protect_prompt=False`, the prompt stay where the cap has room for them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lethe_compile.policies.base import RoundState
from lethe_compile.policies.budgeted import ObservedPolicy
from lethe_compile.policies.pooling import ODD, pooled
from lethe_compile.settings import SHARE, Settings, integer, number, setting

_ELEMENTS = 1 << 24  # similarities computed at once, which bounds memory: 64 MiB a copy


@dataclass(frozen=True)
class RkvOptions(Settings):
    importance: float = setting(0.1, SHARE)
    """λ: weight of the importance; the rest is that of the redundancy."""

    window: int = setting(8, integer(1))
    """α: newest queries that tell importance; their tokens stay in any case, as far as half the cap goes."""

    kernel: int = setting(7, ODD)
    """Neighbouring tokens of which the most important counts; 1 for none."""

    similar: float = setting(0.5, number("in [-1, 1]", lambda v: -1 <= v <= 1))
    """T: cosine similarity of two keys above which their tokens resemble each other."""


class RkvPolicy(ObservedPolicy):
    """Keep tokens that the newest queries attend to and whose keys are unlike the others'."""

    name = "rkv"
    Options = RkvOptions
    options: RkvOptions

    def scores(self, view: RoundState) -> Tensor:
        weight = self.options.importance
        valid = view.position >= 0
        alike = [redundancy(view.keys(i), valid[i], self.options.similar) for i in range(len(view.windows))]
        attention = pooled(view.mass, self.options.kernel, "max")
        total = view.mass.sum(2, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        return weight * (attention / total) - (1 - weight) * torch.stack(alike)


def redundancy(keys: Tensor, valid: Tensor, similar: float) -> Tensor:
    """R [R, N] of tokens with `keys` [R, N, num_kv_heads, k_dim], 0 where `valid` [R, N] is not; the oldest first.

    Similarities are made in blocks of tokens and never all at once.
    """
    rows, slots, heads, _ = keys.shape
    unit = F.normalize(keys.float(), dim=3).masked_fill(~valid[:, :, None, None], 0).transpose(1, 2)  # [R, H, N, D]
    slot = torch.arange(slots, device=keys.device)
    total = unit.new_zeros(rows, heads, slots)
    size = max(1, _ELEMENTS // max(1, rows * heads * slots))
    for start in range(0, slots, size):
        similarity = unit[:, :, start : start + size] @ unit.mT  # [R, H, size, N]
        similarity = similarity.masked_fill(slot[start : start + size, None] == slot, 0)
        newest = torch.where(similarity > similar, slot, -1).amax(3, keepdim=True)  # -1: nothing resembles it
        total += similarity.masked_fill(slot == newest, 0).sum(2)
    mean = total / valid.sum(1).clamp(min=1)[:, None, None]
    return mean.masked_fill(~valid[:, None], -torch.inf).softmax(2).mean(1).masked_fill(~valid, 0)
