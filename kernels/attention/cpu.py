"""Cached attention for a CPU: the same function as the reference, without gathering a key or a value.

The pool's storage is ``[kv_heads, pages, page, dim]``, so a row whose pages are consecutive is one strided
``[kv_heads, tokens, dim]`` matrix, and attention over it is two batched matrix products on a view. Slots are ordered by
position, so what a query may see is one run of slots, and nothing else is read. Rows are ragged, hence a Python loop
over them, some 25 µs a row; gathering the rows into one padded product pays only where they hold fewer than 100 tokens
or so (measured: 2 KV heads, head_dim 64, 8 and 32 rows).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_SCORE_ELEMENTS = 1 << 22  # queries are taken in blocks so that the scores of a long prefill stay within 16 MiB


def serves(query: Tensor, k_pages: Tensor, v_pages: Tensor | None, page_table: Tensor, total: Tensor) -> bool:
    """Whether every row's cache is a view: storage laid out by head, pages consecutive. `total` is [rows]."""
    for pool in (k_pages,) if v_pages is None else (k_pages, v_pages):
        _, _, page, dim = pool.shape
        stride = pool.stride()
        if not pool.is_cpu or pool.dtype != query.dtype or stride[0] != page * dim or stride[2:] != (dim, 1):
            return False
    used = -(-total.numpy() // page)  # NumPy, as on a few integers it takes a third of torch's time
    columns = np.arange(used.max(initial=0))
    table = page_table.numpy()[:, : columns.size]
    return bool(((table - table[:, :1] == columns) | (columns >= used[:, None])).all())


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
    """Shapes, effects and result as `reference.attention`; requires `serves`, and slots ordered by position."""
    rows, heads, steps, _ = query.shape
    kv_heads, page = k_pages.shape[1:3]
    group = heads // kv_heads
    k_storage = k_pages.transpose(0, 1).flatten(1, 2)  # a view, by `serves`
    v_storage = k_storage[..., : value.shape[3]] if v_pages is None else v_pages.transpose(0, 1).flatten(1, 2)
    position, mass = slot_position.view(-1), slot_mass.view(-1)  # [slots]
    # [rows, 3]: first slot, retained tokens, new tokens
    counts = np.stack([page_table[:, 0].numpy() * page, length.numpy(), new_lengths.numpy()], axis=1)
    _append(key, value, k_storage, None if v_pages is None else v_storage, position, mass, counts, positions)

    # Ordered by token, then by head of the group: a run of tokens is a run of queries of each KV head.
    queries = (query * scale).view(rows, kv_heads, group, steps, key.shape[3]).transpose(2, 3).flatten(2, 3)
    out = query.new_zeros(rows, kv_heads, steps * group, value.shape[3])
    sink_sets, slope_sets = (None if each is None else each.view(-1, heads) for each in (sinks, slopes))
    for row, (first, old, new) in enumerate(counts.tolist()):
        sink = None if sink_sets is None else sink_sets[row % len(sink_sets)]
        slope = None if slope_sets is None else slope_sets[row % len(slope_sets)]
        size = max(1, _SCORE_ELEMENTS // (heads * (old + new or 1)))  # tokens of a block
        for at in range(0, new, size):
            upto = min(new, at + size)
            block = slice(at * group, upto * group)
            seen = slice(first, first + old + upto)
            if window is not None:
                oldest = int(positions[row, at])  # of the first query; then the first position that it sees
                oldest = oldest // window * window if chunked else oldest - window + 1
                outside = torch.searchsorted(position[seen], oldest)
                seen = slice(first + int(outside), seen.stop)
            now, stored = positions[row, at:upto], position[seen]
            hidden = None if upto - at == 1 else _hidden(now, stored, window, chunked)
            added = None if slope is None else _alibi(now, stored, slope, kv_heads)
            if bias is not None:
                given = _at(bias[row, :, at:upto], stored, kv_heads, group)
                added = given if added is None else added + given
            probability = _probability(queries[row, :, block], k_storage[:, seen], hidden, softcap, sink, added)
            torch.bmm(probability.to(value.dtype), v_storage[:, seen], out=out[row, :, block])
            if decay is not None:
                fading = decay if at == 0 else 1.0
                if seen.start > first:
                    mass[first : seen.start].mul_(fading)
                slots = mass[seen]
                if peak:
                    torch.maximum(slots.mul_(fading), probability.amax(dim=(0, 1)), out=slots)
                else:
                    torch.add(probability.sum(dim=(0, 1)), slots, alpha=fading, out=slots)
    length += new_lengths
    return out.view(rows, kv_heads, steps, group, value.shape[3]).transpose(2, 3).flatten(1, 2).contiguous()


def _append(
    key: Tensor,
    value: Tensor,
    k_storage: Tensor,
    v_storage: Tensor | None,
    position: Tensor,
    mass: Tensor,
    counts: NDArray[np.int32],
    positions: Tensor,
) -> None:
    """`reference.append` on flat slots: storage is [kv_heads, slots, dim], position and mass are [slots]."""
    rows, _, steps, _ = key.shape
    row, token = (np.arange(steps) < counts[:, 2:]).nonzero()  # [new]
    slot = torch.from_numpy(counts[row, 0] + counts[row, 1] + token)
    if steps == 1 and row.size == rows:  # a decode step of all rows: nothing to pick
        key, value, positions = key[:, :, 0], value[:, :, 0], positions[:, 0]
    else:
        at = torch.from_numpy(row), slice(None), torch.from_numpy(token)
        key, value, positions = key[at], value[at], positions[at[0], at[2]]
    k_storage.index_copy_(1, slot, key.transpose(0, 1))
    if v_storage is not None:
        v_storage.index_copy_(1, slot, value.transpose(0, 1))
    position.index_copy_(0, slot, positions.to(position.dtype))
    mass.index_fill_(0, slot, 0.0)


def _hidden(positions: Tensor, stored: Tensor, window: int | None, chunked: bool) -> Tensor:
    """[T, N] keys that a query may not see."""
    age = positions[:, None] - stored
    if window is None:
        return age < 0
    return (age < 0) | (age > positions[:, None] % window if chunked else age >= window)


def _alibi(positions: Tensor, stored: Tensor, slopes: Tensor, kv_heads: int) -> Tensor:
    """[kv_heads, T * G, N] of ALiBi, ordered as queries are."""
    age = positions[:, None] - stored  # [T, N]
    return (-slopes.view(kv_heads, 1, -1, 1) * age[:, None]).flatten(1, 2)


def _at(bias: Tensor, stored: Tensor, kv_heads: int, group: int) -> Tensor:
    """[1 | kv_heads, T * G, N] of a bias [1 | heads, T, P] of positions, ordered as queries are."""
    bias = bias[:, :, stored.long()]  # [1 | heads, T, N]
    if len(bias) == 1:
        return bias.repeat_interleave(group, dim=1)
    return bias.view(kv_heads, group, *bias.shape[1:]).transpose(1, 2).flatten(1, 2)


def _probability(
    queries: Tensor,
    keys: Tensor,
    hidden: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """[kv_heads, T * G, N] in at least float32, of queries [kv_heads, T * G, D] over keys [kv_heads, N, D]."""
    scores = torch.bmm(queries, keys.mT)
    if scores.dtype in (torch.bfloat16, torch.float16):
        scores = scores.float()
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    if bias is not None:
        scores += bias
    if hidden is not None:
        scores.unflatten(1, (len(hidden), -1)).masked_fill_(hidden[:, None], float("-inf"))
    if sinks is None:
        return torch.softmax(scores, dim=-1)
    kv_heads, size, tokens = scores.shape
    sink = sinks.to(scores.dtype).view(kv_heads, 1, -1)  # [kv_heads, 1, G]
    column = sink.repeat(1, size // sink.shape[2], 1).view(kv_heads, size, 1)
    return torch.softmax(torch.cat([scores, column], dim=-1), dim=-1)[..., :tokens]
