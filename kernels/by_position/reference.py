"""What a layer retains, laid out by the position of its tokens instead of by slot, for masks that read the content.

A model that computes its mask from the tokens themselves (the top keys of an index, blocks of keys) does so over a
whole sequence. Here column p of such a mask is the token at position p whatever was evicted; who is gone is invisible.
"""

from __future__ import annotations

import torch
from torch import Tensor


def columns(
    new: Tensor,
    k_pages: Tensor,
    slot_position: Tensor,
    page_table: Tensor,
    length: Tensor,
    positions: Tensor,
    new_lengths: Tensor,
    seen: Tensor,
    *,
    k_dim: int,
    offset: int,
) -> Tensor:
    """Values that are cached beside the keys, of all retained tokens and the new ones.

    Args:
        new: ``[rows, T, width]``, of the new tokens, which are not yet in the cache.
        k_pages: ``[pages, kv_heads, page, k_dim + extra]``; the values of a token are `width` of the ``kv_heads *
            extra`` numbers behind its keys, from `offset` on.
        slot_position: ``[pages, page]`` int32.
        page_table, length: ``[rows, max_pages]`` and ``[rows]`` int32, this layer's.
        positions, new_lengths: ``[rows, T]`` and ``[rows]``, of the new tokens, right-padded.
        seen: ``[P]``, 0 … P-1, beyond every position.

    Returns:
        ``[rows, P, width]``; zero at positions of which nothing is retained.
    """
    rows, _, width = new.shape
    pages, offsets, stored = _stored(slot_position, page_table, length, len(seen))
    kept = k_pages[pages, :, offsets, k_dim:].flatten(2)[:, :, offset : offset + width]  # [rows, N, width]
    out = new.new_zeros(rows, len(seen) + 1, width)  # one more, for what is no token
    out.scatter_(1, stored[:, :, None].expand_as(kept), kept)
    out.scatter_(1, _new(positions, new_lengths, len(seen))[:, :, None].expand_as(new), new)
    return out[:, :-1]


def visible(
    slot_position: Tensor,
    page_table: Tensor,
    length: Tensor,
    positions: Tensor,
    new_lengths: Tensor,
    seen: Tensor,
    *,
    window: int | None = None,
    chunked: bool = False,
) -> Tensor:
    """Which positions each new token sees: those retained, up to its own, and within its window or chunk.

    Shapes as `columns`. Returns bool ``[rows, T, P]``.
    """
    size = len(seen)
    _, _, stored = _stored(slot_position, page_table, length, size)
    present = torch.zeros(len(positions), size + 1, dtype=torch.bool, device=seen.device)
    present.scatter_(1, stored, True)
    present.scatter_(1, _new(positions, new_lengths, size), True)
    age = positions[:, :, None] - seen  # [rows, T, P]
    allowed = present[:, None, :-1] & (age >= 0)
    if window is not None:
        allowed &= age <= positions[:, :, None] % window if chunked else age < window
    return allowed


def _stored(slot_position: Tensor, page_table: Tensor, length: Tensor, beyond: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pages, offsets and positions ``[rows, N]`` of the retained tokens; the position is `beyond` where there is none.

    N is that of the longest row.
    """
    page = slot_position.shape[1]
    slots = torch.arange(int(length.max()) if len(length) else 0, device=length.device)
    pages = page_table[:, slots // page].long()
    offsets = (slots % page).expand_as(pages)
    stored = slot_position[pages, offsets].long()
    return pages, offsets, stored.masked_fill(slots >= length[:, None], beyond)


def _new(positions: Tensor, new_lengths: Tensor, beyond: int) -> Tensor:
    """Positions ``[rows, T]`` of the new tokens, `beyond` for padding."""
    steps = torch.arange(positions.shape[1], device=positions.device)
    return positions.long().masked_fill(steps >= new_lengths[:, None], beyond)
