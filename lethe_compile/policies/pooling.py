"""Pooling of scores over neighbouring slots, the same bits on every device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lethe_compile.settings import Rule, is_integer

ODD = Rule("an odd integer in 1..63", lambda v: is_integer(v) and 1 <= v <= 63 and v % 2 == 1)
"""What a kernel may be."""


def pooled(score: Tensor, kernel: int, how: str) -> Tensor:
    """Mean ("avg") or maximum ("max") of `kernel` slots, an odd number, around each: scores [..., N] >= 0.

    Beyond either end there are zeros, as in `torch.nn.functional.avg_pool1d`. Sums run from left to right, which a
    library's kernel does not promise, so that a GPU chooses what a CPU would.
    """
    half, size = kernel // 2, score.shape[-1]
    padded = F.pad(score, (half, half))
    total = padded[..., :size]
    for shift in range(1, kernel):
        neighbour = padded[..., shift : shift + size]
        total = total + neighbour if how == "avg" else torch.maximum(total, neighbour)
    return total / kernel if how == "avg" else total
