"""Cached attention for a CPU: the same function as the reference, without gathering a key or a value.

The pool's storage is ``[kv_heads, pages, page, dim]``, so a row whose pages are consecutive is one strided
``[kv_heads, tokens, dim]`` matrix, and attention over it is two batched matrix products on a view. Rows are ragged: a
Python loop over them costs a few microseconds a row, the matrix products read the row's cache once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lethe_compile.kernels.attention import reference

_SCORE_ELEMENTS = 1 << 22  # queries are taken in chunks so that the scores of a long prefill stay within 16 MiB


def serves(k_pages: Tensor, v_pages: Tensor, page_table: Tensor, total: Tensor) -> bool:
    """Whether every row's cache is a view: storage laid out by head, pages consecutive. `total` is [rows]."""
    for pool in (k_pages, v_pages):
        _, _, page, dim = pool.shape
        if pool.stride(0) != page * dim or pool.stride(2) != dim or pool.stride(3) != 1:
            return False
    used = -(-int(total.max()) // k_pages.shape[2])
    columns = torch.arange(used, dtype=page_table.dtype)
    beyond = columns >= (-(-total // k_pages.shape[2]))[:, None]
    return bool(((page_table[:, :used] - page_table[:, :1] == columns) | beyond).all())


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slot_position: Tensor,
    slot_mass: Tensor,
    page_table: Tensor,
    length: Tensor,
    positions: Tensor,
    new_lengths: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    decay: float | None = None,
) -> Tensor:
    """Shapes, effects and result as `reference.attention`; requires `serves`."""
    reference.append(key, value, k_pages, v_pages, slot_position, slot_mass, page_table, length, positions, new_lengths)
    rows, heads, steps, _ = query.shape
    kv_heads, page = k_pages.shape[1], slot_position.shape[1]
    out = query.new_zeros(rows, heads, steps, value.shape[-1])
    grouped = query.unflatten(1, (kv_heads, heads // kv_heads))  # [rows, kv_heads, G, T, k_dim]
    sink = None if sinks is None else sinks.view(kv_heads, -1, 1, 1)
    position, mass = slot_position.view(-1), slot_mass.view(-1)  # [pages * page]
    k_storage, v_storage = (pool.transpose(0, 1).flatten(1, 2) for pool in (k_pages, v_pages))  # views, by `serves`
    counts = zip(new_lengths.tolist(), length.tolist(), page_table[:, 0].tolist(), strict=True)
    for row, (new, old, first_page) in enumerate(counts):
        if not new:
            continue
        start, tokens = first_page * page, old + new
        keys = k_storage[:, start : start + tokens]  # [kv_heads, N, k_dim]
        values = v_storage[:, start : start + tokens]
        stored = position[start : start + tokens]
        added = None
        chunk = max(1, _SCORE_ELEMENTS // (heads * tokens))
        for at in range(0, new, chunk):
            block = slice(at, min(new, at + chunk))
            hidden = _hidden(positions[row, block], stored, window)
            attended, taken = _attend(
                grouped[row, :, :, block], keys, values, hidden, scale, softcap, sink, decay is not None
            )
            out[row, :, block] = attended.flatten(0, 1)
            if taken is not None:
                added = taken if added is None else added + taken
        if added is not None and decay is not None:
            mass[start : start + tokens].mul_(decay).add_(added)
    length += new_lengths
    return out


def _hidden(positions: Tensor, stored: Tensor, window: int | None) -> Tensor | None:
    """[T, N] keys that a query may not see, or None where all are visible: the newest query sees every retained key."""
    if positions.numel() == 1 and (window is None or int(positions[0] - stored[0]) < window):
        return None
    age = positions[:, None] - stored
    return age < 0 if window is None else (age < 0) | (age >= window)


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    hidden: Tensor | None,
    scale: float,
    softcap: float | None,
    sink: Tensor | None,
    track: bool,
) -> tuple[Tensor, Tensor | None]:
    """One row: query [kv_heads, G, T, k_dim] over keys [kv_heads, N, k_dim] -> ([kv_heads, G, T, v_dim], mass [N])."""
    kv_heads, group, steps, _ = query.shape
    scores = torch.bmm((query * scale).flatten(1, 2), keys.transpose(1, 2))  # [kv_heads, G * T, N]
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    tokens = scores.shape[-1]
    if hidden is not None:
        scores.view(kv_heads, group, steps, tokens).masked_fill_(hidden, float("-inf"))
    if sink is not None:
        column = sink.to(scores.dtype).expand(-1, -1, steps, 1).flatten(1, 2)  # [kv_heads, G * T, 1]
        scores = torch.cat([scores, column], dim=-1)
    probability = torch.softmax(scores, dim=-1)[..., :tokens]
    out = torch.bmm(probability.to(values.dtype), values)
    mass = probability.sum(dim=(0, 1)) if track else None
    return out.view(kv_heads, group, steps, -1), mass
