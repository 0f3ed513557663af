"""Ordered in-place compaction on a GPU: `reference.compact` for all layers and rows of a pool in one launch.

A program moves one thing of one row: the keys of a head, the values of a head, or positions and masses. It goes through
the slots in order, a block at a time: load, barrier, store. A kept slot never moves up, so that a store can only hit
slots of its own block or of earlier ones, and those are read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 4096  # elements moved at once: 32 a thread
_SCAN = 512  # slots whose flags, positions or masses are taken at once


@triton.jit
def _target(keep, slot, length, before):
    """Which slots are kept, where they go with `before` kept ones ahead of this block, and that count after it."""
    kept = tl.load(keep + slot, mask=slot < length, other=0) != 0
    one = kept.to(tl.int32)
    return kept, before + tl.cumsum(one) - one, before + tl.sum(one)


@triton.jit
def _move(pages, table, keep, length, first, page_stride, slot_stride, PAGE: tl.constexpr, DIM: tl.constexpr,
          WIDE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Keys or values of one head, from slot `first` on: pages [pages, PAGE, DIM] by those strides; WIDE >= DIM."""
    lane, dim = tl.arange(0, BLOCK), tl.arange(0, WIDE)
    before = first
    for start in range(first, length, BLOCK):
        slot = start + lane
        kept, target, before = _target(keep, slot, length, before)
        source_page = tl.load(table + slot // PAGE, mask=kept, other=0).to(tl.int64)
        target_page = tl.load(table + target // PAGE, mask=kept, other=0).to(tl.int64)
        source = source_page * page_stride + (slot % PAGE) * slot_stride
        goal = target_page * page_stride + (target % PAGE) * slot_stride
        mask = kept[:, None] & (dim < DIM)[None, :]
        tile = tl.load(pages + source[:, None] + dim[None, :], mask=mask)
        tl.debug_barrier()  # one thread's target is another's source
        tl.store(pages + goal[:, None] + dim[None, :], tile, mask=mask)


@triton.jit
def _move_slots(position, mass, table, keep, length, first, PAGE: tl.constexpr, BLOCK: tl.constexpr):
    """Positions and masses, from slot `first` on; returns the tokens kept."""
    lane = tl.arange(0, BLOCK)
    before = first
    for start in range(first, length, BLOCK):
        slot = start + lane
        kept, target, before = _target(keep, slot, length, before)
        source_page = tl.load(table + slot // PAGE, mask=kept, other=0).to(tl.int64)
        target_page = tl.load(table + target // PAGE, mask=kept, other=0).to(tl.int64)
        source, goal = source_page * PAGE + slot % PAGE, target_page * PAGE + target % PAGE
        stored, score = tl.load(position + source, mask=kept), tl.load(mass + source, mask=kept)
        tl.debug_barrier()  # one thread's target is another's source
        tl.store(position + goal, stored, mask=kept)
        tl.store(mass + goal, score, mask=kept)
    return before


@triton.jit
def _compact(
    k_pages,  # [pages, HEADS, PAGE, K_DIM] by strides, the last 1
    v_pages,  # [pages, HEADS, PAGE, V_DIM] by strides, the last 1; None where keys hold the values: V_DIM 0
    position,  # [pages, PAGE] int32
    mass,  # [pages, PAGE] fp32
    table,  # [rows, width] int32
    lengths,  # [rows] int32
    keep,  # [rows, n] int8
    kept_lengths,  # [rows] int32, written
    width,
    n,
    k_page,
    k_head,
    k_slot,
    v_page,
    v_head,
    v_slot,
    HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    K_WIDE: tl.constexpr,
    V_WIDE: tl.constexpr,
    K_BLOCK: tl.constexpr,
    V_BLOCK: tl.constexpr,
    SCAN: tl.constexpr,
):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length = tl.load(lengths + row)
    table += row * width
    keep += row * n
    # The first dropped slot: what lies before it stays where it is.
    nearest = tl.zeros([SCAN], tl.int32) + length
    for start in range(0, length, SCAN):
        slot = start + tl.arange(0, SCAN)
        dropped = tl.load(keep + slot, mask=slot < length, other=1) == 0
        nearest = tl.minimum(nearest, tl.where(dropped, slot, length))
    first = tl.min(nearest)
    head = (part % HEADS).to(tl.int64)
    if part == tl.num_programs(1) - 1:
        kept = _move_slots(position, mass, table, keep, length, first, PAGE, SCAN)
        tl.store(kept_lengths + row, kept)
    elif part < HEADS:
        _move(k_pages + head * k_head, table, keep, length, first, k_page, k_slot, PAGE, K_DIM, K_WIDE, K_BLOCK)
    elif V_DIM > 0:
        _move(v_pages + head * v_head, table, keep, length, first, v_page, v_slot, PAGE, V_DIM, V_WIDE, V_BLOCK)


def compact(
    k_pages: Tensor,
    v_pages: Tensor | None,
    slot_position: Tensor,
    slot_mass: Tensor,
    page_table: Tensor,
    length: Tensor,
    keep: Tensor,
) -> Tensor:
    """Arguments, effects and result of `reference.compact`; rows are those of any number of layers."""
    heads, page, k_dim = k_pages.shape[1:]
    v_dim, rows = 0 if v_pages is None else v_pages.shape[3], len(length)
    assert k_pages.stride(3) == 1 and (v_pages is None or v_pages.stride(3) == 1)
    assert slot_position.is_contiguous() and slot_mass.is_contiguous()
    kept = torch.empty_like(length, dtype=torch.int32)
    if not rows:
        return kept
    k_wide, v_wide = triton.next_power_of_2(k_dim), triton.next_power_of_2(max(1, v_dim))
    _compact[(rows, (1 if v_pages is None else 2) * heads + 1)](
        k_pages,
        v_pages,
        slot_position,
        slot_mass,
        page_table.contiguous(),
        length.int().contiguous(),
        keep.contiguous().view(torch.int8),
        kept,
        page_table.shape[1],
        keep.shape[1],
        *k_pages.stride()[:3],
        *((0, 0, 0) if v_pages is None else v_pages.stride()[:3]),
        HEADS=heads,
        PAGE=page,
        K_DIM=k_dim,
        V_DIM=v_dim,
        K_WIDE=k_wide,
        V_WIDE=v_wide,
        K_BLOCK=_block(k_wide),
        V_BLOCK=_block(v_wide),
        SCAN=_SCAN,
        num_warps=4,
    )
    return kept


def _block(width: int) -> int:
    """Slots moved at once where each is `width` elements."""
    return max(8, min(256, _TILE // width))
