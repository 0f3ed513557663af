"""Cached attention in plain PyTorch: append, attend, and accumulate RASR mass. The truth for the fast kernels.

Any device, any page table, any dtype; every page that a row holds is gathered, so this is not fast.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    k_pages: Tensor,
    v_pages: Tensor | None,
    slot_position: Tensor,
    slot_mass: Tensor,
    page_table: Tensor,
    length: Tensor,
    positions: Tensor,
    new_lengths: Tensor,
    *,
    scale: float,
    window: int | None = None,
    chunked: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    decay: float | None = None,
    peak: bool = False,
    bias: Tensor | None = None,
) -> Tensor:
    """Append the new tokens of one layer, attend over all it retains, update each slot's attention mass.

    Rows are right-padded: token ``t`` of row ``r`` is real iff ``t < new_lengths[r]``. A key at position p is visible
    to a query at position q iff ``p <= q`` and, with a window, ``q - p < window``, or, where windows are chunks,
    ``q // window == p // window``: stored positions decide, never slot indices.

    Args:
        query: ``[rows, heads, T, k_dim]``, rotated already where the model rotates.
        key, value: ``[rows, kv_heads, T, k_dim | v_dim]``, the new tokens.
        k_pages, v_pages: ``[pages, kv_heads, page, k_dim | v_dim]``, written. `v_pages` None: a value is the first
            v_dim numbers of its key, `value` those of `key`, and is not stored again.
        slot_position, slot_mass: ``[pages, page]`` int32 and float32, written.
        page_table: ``[rows, max_pages]`` int32, this layer's; must hold pages for ``length + new_lengths`` tokens.
        length: ``[rows]`` int32, this layer's retained tokens; advanced by ``new_lengths``.
        positions: ``[rows, T]`` logical positions of the new tokens.
        new_lengths: ``[rows]`` int32, 0 for a row that takes no part.
        sinks: ``[sets * heads]`` logits of a learned column that takes probability and gives nothing, or None. Rows
            take turns: row r has set ``r % sets``. There is one set, unless the KV heads of a sequence are rows.
        slopes: ``[sets * heads]`` of ALiBi: a score falls by ``slope * (q - p)``; or None.
        decay: gamma of ``s_t = gamma * s_{t-1} + sum over heads and queries of A_t`` (Lethe, RASR); None: mass stays.
        bias: ``[rows, 1 | heads, T, P]``, added to a query's score of the key at position p; or None.

    Returns:
        ``[rows, heads, T, v_dim]``; zero where a query is padding.
    """
    rows, heads, steps, _ = query.shape
    kv_heads, page = k_pages.shape[1], slot_position.shape[1]
    append(key, value, k_pages, v_pages, slot_position, slot_mass, page_table, length, positions, new_lengths)
    total = length + new_lengths  # [rows]
    slots = torch.arange(int(total.max()) if rows else 0, device=query.device)  # [N]
    pages = page_table[:, slots // page].long()  # [rows, N]
    offsets = (slots % page).expand_as(pages)
    keys = k_pages[pages, :, offsets].transpose(1, 2)  # [rows, kv_heads, N, k_dim]
    values = keys[..., : value.shape[3]] if v_pages is None else v_pages[pages, :, offsets].transpose(1, 2)
    stored = slot_position[pages, offsets]  # [rows, N]

    compute = torch.promote_types(query.dtype, torch.float32)
    grouped = query.to(compute).unflatten(1, (kv_heads, heads // kv_heads))  # [rows, kv_heads, G, T, k_dim]
    scores = torch.einsum("rhgtd,rhnd->rhgtn", grouped, keys.to(compute)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    is_query = torch.arange(steps, device=query.device) < new_lengths[:, None]  # [rows, T]
    age = positions[:, :, None] - stored[:, None, :]  # [rows, T, N]
    if slopes is not None:
        scores = scores - by_row(slopes.to(compute), rows, heads).view(rows, kv_heads, -1, 1, 1) * age[:, None, None]
    if bias is not None:
        at = stored.clamp(0, bias.shape[3] - 1).long()[:, None, None].expand(-1, bias.shape[1], steps, -1)
        added = bias.gather(3, at).to(compute)  # [rows, 1 | heads, T, N]
        scores = scores + (added[:, None] if added.shape[1] == 1 else added.unflatten(1, (kv_heads, -1)))
    visible = (age >= 0) & (slots < total[:, None])[:, None, :] & is_query[:, :, None]
    if window is not None:
        visible &= age <= positions[:, :, None] % window if chunked else age < window
    visible = visible[:, None, None]  # [rows, 1, 1, T, N]
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        column = by_row(sinks.to(compute), rows, heads).view(rows, kv_heads, -1, 1, 1).expand(-1, -1, -1, steps, 1)
        scores = torch.cat([scores, column], dim=-1)
    probability = torch.softmax(scores, dim=-1)[..., : slots.numel()].masked_fill(~visible, 0)
    # A slot that holds no token may hold anything, NaN included: a zero probability does not silence it.
    values = values.to(compute).masked_fill((slots >= total[:, None])[:, None, :, None], 0)
    out = torch.einsum("rhgtn,rhnd->rhgtd", probability, values)
    if decay is not None:
        seen = probability.amax(dim=(1, 2, 3)) if peak else probability.sum(dim=(1, 2, 3))
        _score(slot_mass, seen, pages, offsets, total, new_lengths, decay, peak)
    length += new_lengths
    return out.flatten(1, 2).to(query.dtype)


def by_row(learned: Tensor, rows: int, heads: int) -> Tensor:
    """``[rows, heads]`` of ``[sets * heads]`` numbers: row r has set ``r % sets``."""
    sets = learned.view(-1, heads)
    return sets[torch.arange(rows, device=learned.device) % len(sets)]


def append(
    key: Tensor,
    value: Tensor,
    k_pages: Tensor,
    v_pages: Tensor | None,
    slot_position: Tensor,
    slot_mass: Tensor,
    page_table: Tensor,
    length: Tensor,
    positions: Tensor,
    new_lengths: Tensor,
) -> None:
    """Write the new tokens behind each row's last slot, their position, and a mass of zero. Shapes as `attention`."""
    page = slot_position.shape[1]
    step = torch.arange(key.shape[2], device=key.device)
    row, token = (step < new_lengths[:, None]).nonzero(as_tuple=True)  # [new]
    slot = length[row].long() + token
    pages, offsets = page_table[row, slot // page].long(), slot % page
    k_pages[pages, :, offsets] = key[row, :, token]
    if v_pages is not None:
        v_pages[pages, :, offsets] = value[row, :, token]
    slot_position[pages, offsets] = positions[row, token].to(slot_position.dtype)
    slot_mass[pages, offsets] = 0.0


def _score(
    slot_mass: Tensor,
    seen: Tensor,
    pages: Tensor,
    offsets: Tensor,
    total: Tensor,
    new_lengths: Tensor,
    decay: float,
    peak: bool,
) -> None:
    """Fade the slots of rows that took part and add `seen` [rows, N], or keep the larger; other rows keep theirs."""
    live = (torch.arange(seen.shape[1], device=seen.device) < total[:, None]) & (new_lengths > 0)[:, None]
    at = (pages[live], offsets[live])
    faded, added = slot_mass[at] * decay, seen[live].to(slot_mass.dtype)
    slot_mass[at] = torch.maximum(faded, added) if peak else faded + added
