"""Cached attention without paging and without writes, in core aten only: what programs for other runtimes are made of.

A cache is one tensor of fixed capacity per layer, ``[rows, kv_heads, capacity, dim]``: slot j of a row is column j,
which is a page table that is the identity. Everything is a function of its inputs, of any batch and number of tokens.
What lies behind a row's end is never seen, but must be finite: a zero probability does not silence a NaN.

A token that is padding is written too, behind the row's last slot, where nothing reads it and the next token replaces
it: so ``capacity >= length + T`` must hold for every row, and no index is ever written twice.
"""

from __future__ import annotations

import torch
from torch import Tensor


def append(cache: Tensor, new: Tensor, length: Tensor) -> Tensor:
    """Keys or values ``[rows, kv_heads, capacity, dim]`` with ``new [rows, kv_heads, T, dim]`` behind each row's."""
    slots = length.long()[:, None] + torch.arange(new.shape[2], device=new.device)  # [rows, T]
    return cache.scatter(2, slots[:, None, :, None].expand_as(new), new)


def append_position(position: Tensor, positions: Tensor, length: Tensor) -> Tensor:
    """Stored positions ``[rows, capacity]`` int32 with those of the new tokens ``[rows, T]`` behind each row's."""
    slots = length.long()[:, None] + torch.arange(positions.shape[1], device=positions.device)
    return position.scatter(1, slots, positions.to(position.dtype))


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    length: Tensor,
    positions: Tensor,
    new_lengths: Tensor,
    sinks: Tensor | None,
    slopes: Tensor | None,
    scale: float,
    window: int | None,
    chunked: bool,
    softcap: float | None,
    peak: bool,
) -> tuple[Tensor, Tensor]:
    """Attention over a cache to which the new tokens have been appended; `length` is that before.

    Other operands and the result ``[rows, heads, T, v_dim]`` are as in `reference.attention`. Also returns what each
    slot got, ``[rows, capacity]`` float32: the sum over heads and queries, or with `peak` the largest probability.
    """
    rows, heads, steps, dim = query.shape
    kv_heads, capacity = keys.shape[1], keys.shape[2]
    group = heads // kv_heads
    compute = torch.promote_types(query.dtype, torch.float32)
    grouped = (query * scale).reshape(rows, kv_heads, group * steps, dim)
    scores = torch.matmul(grouped, keys.transpose(2, 3)).to(compute)
    scores = scores.reshape(rows, kv_heads, group, steps, capacity)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    now = positions.to(position.dtype)[:, :, None]  # [rows, T, 1]
    age = now - position[:, None, :]  # [rows, T, capacity]
    if slopes is not None:
        scores = scores - slopes.to(compute).reshape(1, kv_heads, group, 1, 1) * age[:, None, None].to(compute)
    hidden = _hidden(age, now, length, new_lengths, window, chunked)[:, None, None]  # [rows, 1, 1, T, capacity]
    # The lowest finite number, not -inf: a query that is padding sees nothing, and must not become NaN.
    scores = scores.masked_fill(hidden, torch.finfo(compute).min)
    if sinks is not None:
        column = sinks.to(compute).reshape(1, kv_heads, group, 1, 1).expand(rows, -1, -1, steps, 1)
        scores = torch.cat([scores, column], dim=-1)
    probability = torch.softmax(scores, dim=-1)
    if sinks is not None:
        probability = probability[..., :capacity]
    probability = probability.masked_fill(hidden, 0.0)
    seen = probability.amax(dim=(1, 2, 3)) if peak else probability.sum(dim=(1, 2, 3))
    weights = probability.reshape(rows, kv_heads, group * steps, capacity).to(values.dtype)
    out = torch.matmul(weights, values).reshape(rows, heads, steps, values.shape[3])
    return out.to(query.dtype), seen.to(torch.float32)


def _hidden(age: Tensor, now: Tensor, length: Tensor, new_lengths: Tensor, window: int | None, chunked: bool) -> Tensor:
    """[rows, T, capacity] slots that a query may not see: empty, later, or outside of its window; all, if padding."""
    steps, capacity = age.shape[1:]
    total = (length + new_lengths)[:, None]
    empty = torch.arange(capacity, device=age.device) >= total  # [rows, capacity]
    padding = torch.arange(steps, device=age.device) >= new_lengths[:, None]  # [rows, T]
    hidden = (age < 0) | empty[:, None, :] | padding[:, :, None]
    if window is None:
        return hidden
    return hidden | (age > now % window if chunked else age >= window)


def score(
    mass: Tensor, seen: Tensor, length: Tensor, new_lengths: Tensor, decay: Tensor, peak: bool, shares: bool
) -> Tensor:
    """Masses ``[rows, capacity]`` after a step that `seen` came from; rows that took no part keep theirs.

    `decay` is ``[1]`` float32.

    A layer that `shares` the cache of an earlier one adds to what that one has scored in this step.
    """
    slots = torch.arange(mass.shape[1], device=mass.device)
    if not shares:
        mass = mass.masked_fill(slots >= length[:, None], 0.0)  # new slots, and whatever lies behind
        mass = torch.where(new_lengths[:, None] > 0, mass * decay, mass)
    return torch.maximum(mass, seen) if peak else mass + seen
