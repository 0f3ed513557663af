"""Ordered in-place compaction of one layer's cache, in plain PyTorch: the truth the fast kernels are tested against."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK_BYTES = 1 << 24  # of gathered keys or values: bounds the scratch memory, and a host's allocator reuses the block


def compact(
    k_pages: Tensor,
    v_pages: Tensor | None,
    slot_position: Tensor,
    slot_mass: Tensor,
    page_table: Tensor,
    length: Tensor,
    keep: Tensor,
) -> Tensor:
    """Move each row's kept slots to its front, in order; what lies behind them is left as it was.

    Only slots that change place are touched: rows that keep everything, and the kept head of the others, cost nothing.

    Args:
        k_pages, v_pages: ``[pages, kv_heads, page, k_dim | v_dim]``, written; `v_pages` None: keys hold the values.
        slot_position, slot_mass: ``[pages, page]`` int32 and float32, written.
        page_table: ``[rows, max_pages]`` int32, this layer's; no page belongs to two rows.
        length: ``[rows]`` int32 retained tokens; not written.
        keep: ``[rows, N]`` bool, N at least the longest row; what it says beyond a row's length is ignored.

    Returns:
        ``[rows]`` int32 tokens kept.
    """
    page = slot_position.shape[1]
    keep = keep & (torch.arange(keep.shape[1], device=keep.device) < length[:, None])
    rank = keep.cumsum(dim=1) - 1  # [rows, N] slot that a kept one moves to
    row, source = (keep & (rank != torch.arange(keep.shape[1], device=keep.device))).nonzero(as_tuple=True)  # [moves]
    target = rank[row, source]
    source_page, source_slot = page_table[row, source // page].long(), source % page
    target_page, target_slot = page_table[row, target // page].long(), target % page

    for pages in (k_pages,) if v_pages is None else (k_pages, v_pages):
        # Moves are sorted by row and slot, and target < source: no chunk overwrites what a later one reads.
        step = max(1, _CHUNK_BYTES // (pages.shape[1] * pages.shape[3] * pages.element_size()))
        for at in range(0, row.numel(), step):
            chunk = slice(at, at + step)
            pages[target_page[chunk], :, target_slot[chunk]] = pages[source_page[chunk], :, source_slot[chunk]]
    for slots in (slot_position, slot_mass):
        slots[target_page, target_slot] = slots[source_page, source_slot]
    return keep.sum(dim=1, dtype=torch.int32)
