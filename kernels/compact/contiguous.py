"""Compaction of contiguous caches without writes, in core aten only; see `kernels.attention.contiguous`."""

from __future__ import annotations

import torch
from torch import Tensor


def sources(keep: Tensor) -> Tensor:
    """Where the slots of a compacted cache come from: ``[rows, N]`` int64, for keep ``[rows, N]`` bool.

    Kept slots in order, then slot 0 over and over, for what is behind the row's end.
    """
    size = keep.shape[1]
    slots = torch.arange(size, device=keep.device).expand_as(keep)
    # One column more takes what is dropped, so that no column that counts is written twice.
    target = torch.where(keep, keep.long().cumsum(1) - 1, size)  # [rows, N]
    empty = torch.nn.functional.pad(torch.zeros_like(target), (0, 1))
    return empty.scatter(1, target, slots)[:, :size]


def take(values: Tensor, source: Tensor) -> Tensor:
    """``[rows, kv_heads, N, dim]`` or ``[rows, N]`` with the slots that `source` [rows, N] names."""
    if values.dim() == 2:
        return values.gather(1, source)
    return values.gather(2, source[:, None, :, None].expand_as(values))
