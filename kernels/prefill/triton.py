"""Cached attention of many new tokens a row, in Triton: prefill, and extension of a cache that may have been pruned.

Four launches: `_append` writes the new tokens behind each row's last slot; `_forward` is FlashAttention over the pages,
with its log-sum-exp; `_score` keeps a block of keys and walks over the queries, whose probabilities are exact by then;
`_fold` adds what the KV heads found to each slot's score. The truth is `attention.reference`.

Slots are ordered by strictly increasing position. Which keys a query sees is decided by stored positions; slot indices
only bound the loops: a key n slots back is at least n positions back.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lethe_compile.kernels.attention.blocks import FLOOR, LOG2E, dot, fold, page_ids, sets_of, tanh
from lethe_compile.kernels.launch import launch


@triton.jit(do_not_specialize=["table_stride", "position_row"])
def _append(
    key,  # [rows, kv_heads, T, k_dim]
    value,
    k_pages,
    v_pages,  # None where IN_KEYS
    slot_position,
    page_table,
    length,
    positions,
    new_lengths,
    table_stride,
    k_row,
    k_head,
    k_token,
    v_row,
    v_head,
    v_token,
    position_row,
    k_page,
    k_page_head,
    v_page,
    v_page_head,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    IN_KEYS: tl.constexpr,  # a value is the first V_DIM channels of its key
    PAGE: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row, head = tl.program_id(2).to(tl.int64), tl.program_id(1)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    real = token < tl.load(new_lengths + row)
    slot = tl.load(length + row) + token
    page = tl.load(page_table + row * table_stride + slot // PAGE, mask=real, other=0).to(tl.int64)
    offset = slot % PAGE
    d, e = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    in_k, in_v = real[:, None] & (d < K_DIM)[None, :], real[:, None] & (e < V_DIM)[None, :]
    k = tl.load(key + row * k_row + head * k_head + (token * k_token)[:, None] + d[None, :], mask=in_k)
    k_at = k_pages + page * k_page + head * k_page_head + offset * K_DIM
    tl.store(k_at[:, None] + d[None, :], k, mask=in_k)
    if not IN_KEYS:
        v = tl.load(value + row * v_row + head * v_head + (token * v_token)[:, None] + e[None, :], mask=in_v)
        v_at = v_pages + page * v_page + head * v_page_head + offset * V_DIM
        tl.store(v_at[:, None] + e[None, :], v, mask=in_v)
    if head == 0:
        position = tl.load(positions + row * position_row + token, mask=real, other=0)
        tl.store(slot_position + page * PAGE + offset, position.to(tl.int32), mask=real)


@triton.jit
def _visible(
    s,
    age,
    now,
    live,
    slope,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNKED: tl.constexpr,
    SLOPES: tl.constexpr,
):
    """Products as scores times log2(e), -inf where a key is hidden. `age` is the query's position minus the key's."""
    s = s * SCALE
    if SOFTCAP is not None:
        s = tanh(s / SOFTCAP) * (SOFTCAP * LOG2E)
    if SLOPES:
        s -= slope * LOG2E * age.to(tl.float32)
    visible = live & (age >= 0)
    if WINDOW is not None:
        visible = visible & ((age <= now % WINDOW) if CHUNKED else (age < WINDOW))
    return tl.where(visible, s, float("-inf"))


@triton.jit(do_not_specialize=["tokens", "table_stride", "position_row"])
def _forward(
    query,  # [rows, heads, T, k_dim]
    k_pages,
    v_pages,
    slot_position,
    page_table,
    length,
    positions,
    new_lengths,
    sinks,
    slopes,
    out,  # [rows, heads, T, v_dim]
    lse,  # [rows, heads, T] float32, base 2; +inf where a query is padding
    tokens,
    table_stride,
    q_row,
    q_head,
    q_token,
    position_row,
    k_page,
    k_page_head,
    v_page,
    v_page_head,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNKED: tl.constexpr,
    SLOPES: tl.constexpr,
    SINKS: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SETS: tl.constexpr,  # of sinks and slopes; rows take turns
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    IN_KEYS: tl.constexpr,
    REST: tl.constexpr,  # channels of a key beyond its value, where IN_KEYS
    PAGE: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    UPCAST: tl.constexpr,
    STAGES: tl.constexpr,
):
    row, head = tl.program_id(2).to(tl.int64), tl.program_id(1)
    begin = (tl.num_programs(0) - 1 - tl.program_id(0)) * M  # the longest loops first
    kv_head = head // GROUP
    old, new = tl.load(length + row), tl.load(new_lengths + row)
    token, n = begin + tl.arange(0, M), tl.arange(0, BLOCK)
    d, e, r = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_R)
    real, in_k, in_v, in_r = token < new, d < K_DIM - REST, e < V_DIM, r < REST
    q_at = query + row * q_row + head * q_head + (token * q_token)[:, None]
    q = tl.load(q_at + d[None, :], mask=real[:, None] & in_k[None, :], other=0.0)
    q_rest = q
    if REST > 0:
        q_rest = tl.load(q_at + (V_DIM + r)[None, :], mask=real[:, None] & in_r[None, :], other=0.0)
    now = tl.load(positions + row * position_row + token, mask=real, other=-1)
    slope = tl.load(slopes + row % SETS * HEADS + head).to(tl.float32) if SLOPES else 0.0
    table = page_table + row * table_stride

    top = tl.full([M], FLOOR, tl.float32)
    mass = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, BLOCK_V], tl.float32)
    total = old + new
    first, last = 0, 0
    if begin < new:
        last = (old + tl.minimum(begin + M, new) + BLOCK - 1) // BLOCK
        if WINDOW is not None:
            first = tl.maximum(old + begin - WINDOW + 1, 0) // BLOCK
    pages = page_ids(table, first, total, n, PAGE, BLOCK)
    for block in tl.range(first, last, num_stages=STAGES):
        slot = block * BLOCK + n
        live, offset, page = slot < total, slot % PAGE, pages.to(tl.int64)
        pages = page_ids(table, block + 1, total, n, PAGE, BLOCK)
        k_at = k_pages + (page * k_page + kv_head * k_page_head) + offset * K_DIM
        in_block = in_k[:, None]
        if IN_KEYS:  # where a slot is no token, zero weights would not silence a NaN
            in_block = in_block & live[None, :]
        k = tl.load(k_at[None, :] + d[:, None], mask=in_block, other=0.0)
        stored = tl.load(slot_position + page * PAGE + offset, mask=live, other=0)
        age = now[:, None] - stored[None, :]
        s = dot(q, k, UPCAST)  # [M, BLOCK]
        if REST > 0:
            k_rest = tl.load(k_at[None, :] + (V_DIM + r)[:, None], mask=in_r[:, None] & live[None, :], other=0.0)
            s += dot(q_rest, k_rest, UPCAST)
        s = _visible(s, age, now[:, None], live[None, :], slope, SCALE, SOFTCAP, WINDOW, CHUNKED, SLOPES)
        if IN_KEYS:
            v = tl.trans(k)
        else:
            v_at = v_pages + (page * v_page + kv_head * v_page_head) + offset * V_DIM
            v = tl.load(v_at[:, None] + e[None, :], mask=live[:, None] & in_v[None, :], other=0.0)
        top, mass, acc, _ = fold(top, mass, acc, s, v, UPCAST)
    if SINKS:
        sink = tl.load(sinks + row % SETS * HEADS + head).to(tl.float32) * LOG2E
        higher = tl.maximum(top, sink)
        fade = tl.exp2(top - higher)
        mass = mass * fade + tl.exp2(sink - higher)
        acc = acc * fade[:, None]
        top = higher
    result = tl.where(real[:, None], acc / mass[:, None], 0.0)
    inside = token < tokens
    item = row * HEADS + head
    out_at = out + (item * tokens + token)[:, None] * V_DIM + e[None, :]
    tl.store(out_at, result.to(out.dtype.element_ty), mask=inside[:, None] & in_v[None, :])
    tl.store(lse + item * tokens + token, tl.where(real, top + tl.log2(mass), float("inf")), mask=inside)


@triton.jit(do_not_specialize=["tokens", "table_stride", "position_row"])
def _score(
    query,
    k_pages,
    slot_position,
    page_table,
    length,
    positions,
    new_lengths,
    slopes,
    lse,
    seen,  # [rows, kv_heads, capacity] float32: what each KV head's queries gave to a slot
    tokens,
    capacity,
    table_stride,
    q_row,
    q_head,
    q_token,
    position_row,
    k_page,
    k_page_head,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNKED: tl.constexpr,
    SLOPES: tl.constexpr,
    PEAK: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SETS: tl.constexpr,
    K_DIM: tl.constexpr,
    REST: tl.constexpr,
    PAGE: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    UPCAST: tl.constexpr,
    STAGES: tl.constexpr,
):
    row, head, start = tl.program_id(2).to(tl.int64), tl.program_id(1), tl.program_id(0) * BLOCK
    old, new = tl.load(length + row), tl.load(new_lengths + row)
    if (start < old + new) & (new > 0):
        slot, t, d, r = start + tl.arange(0, BLOCK), tl.arange(0, M), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
        live, in_k, in_r = slot < old + new, d < K_DIM - REST, r < REST
        page = tl.load(page_table + row * table_stride + slot // PAGE, mask=live, other=0).to(tl.int64)
        stored = tl.load(slot_position + page * PAGE + slot % PAGE, mask=live, other=0)
        k_at = k_pages + page * k_page + head * k_page_head + slot % PAGE * K_DIM
        k = tl.load(k_at[:, None] + d[None, :], mask=live[:, None] & in_k[None, :], other=0.0)
        k_rest = k
        if REST > 0:
            rest_at = k_at[:, None] + (K_DIM - REST + r)[None, :]
            k_rest = tl.load(rest_at, mask=live[:, None] & in_r[None, :], other=0.0)
        first, last = tl.maximum(start - old, 0) // M, (new + M - 1) // M
        if WINDOW is not None:
            last = tl.minimum(last, (tl.maximum(start + BLOCK - 1 - old + WINDOW, 0) + M - 1) // M)
        count = tl.maximum(last - first, 0)
        found = tl.zeros([BLOCK], tl.float32)
        for step in tl.range(0, count * GROUP, num_stages=STAGES):
            q_of = head * GROUP + step // count
            token = (first + step % count) * M + t
            real = token < new
            q_at = query + row * q_row + q_of * q_head + (token * q_token)[None, :]
            q = tl.load(q_at + d[:, None], mask=real[None, :] & in_k[:, None], other=0.0)  # [D, M]
            now = tl.load(positions + row * position_row + token, mask=real, other=-1)
            total = tl.load(lse + (row * KV_HEADS * GROUP + q_of) * tokens + token, mask=real, other=float("inf"))
            age = now[None, :] - stored[:, None]
            slope = tl.load(slopes + row % SETS * (KV_HEADS * GROUP) + q_of).to(tl.float32) if SLOPES else 0.0
            s = dot(k, q, UPCAST)  # [BLOCK, M]
            if REST > 0:
                rest_of = tl.load(q_at + (K_DIM - REST + r)[:, None], mask=real[None, :] & in_r[:, None], other=0.0)
                s += dot(k_rest, rest_of, UPCAST)
            s = _visible(s, age, now[None, :], live[:, None], slope, SCALE, SOFTCAP, WINDOW, CHUNKED, SLOPES)
            p = tl.exp2(s - total[None, :])
            found = tl.maximum(found, tl.max(p, 1)) if PEAK else found + tl.sum(p, 1)
        tl.store(seen + (row * KV_HEADS + head) * capacity + slot, found, mask=live)


@triton.jit(do_not_specialize=["table_stride"])
def _fold(
    seen,
    slot_mass,
    page_table,
    length,
    new_lengths,
    capacity,
    table_stride,
    DECAY: tl.constexpr,
    PEAK: tl.constexpr,
    KV_HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    SLOTS: tl.constexpr,
):
    row, slot = tl.program_id(1).to(tl.int64), tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    old, new = tl.load(length + row), tl.load(new_lengths + row)
    live = (slot < old + new) & (new > 0)
    page = tl.load(page_table + row * table_stride + slot // PAGE, mask=live, other=0).to(tl.int64)
    mass_at = slot_mass + page * PAGE + slot % PAGE
    found = tl.zeros([SLOTS], tl.float32)
    for head in tl.static_range(KV_HEADS):
        part = tl.load(seen + (row * KV_HEADS + head) * capacity + slot, mask=live, other=0.0)
        found = tl.maximum(found, part) if PEAK else found + part
    faded = tl.load(mass_at, mask=live & (slot < old), other=0.0) * DECAY
    tl.store(mass_at, tl.maximum(faded, found) if PEAK else faded + found, mask=live)


@dataclass(frozen=True)
class Tuning:
    """Queries and keys of a block, warps a program, loads in flight."""

    m: int
    block: int
    warps: int
    stages: int


def tuning(dim: int, itemsize: int, in_keys: bool = False) -> Tuning:
    """Chosen so that a program's blocks fit a Hopper multiprocessor's shared memory.

    Where values are channels of the keys, one block of each is under way: 512 and 64 channels take 144 KiB, no spills.
    """
    if itemsize > 2:
        return Tuning(32, 32, 4, 2 if dim <= 128 else 1)
    if dim <= 128:
        return Tuning(128, 64, 8, 3)
    return Tuning(64, 64, 8, 2) if dim <= 256 else Tuning(64, 32, 8, 2 if in_keys else 1)


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
) -> Tensor:
    """Shapes, effects and result as `attention.reference.attention`; the last dimension is contiguous, and positions
    increase strictly within a row.
    """
    rows, heads, tokens, k_dim = query.shape
    kv_heads, page, v_dim, in_keys = k_pages.shape[1], k_pages.shape[2], value.shape[3], v_pages is None
    device, upcast = query.device, query.dtype == torch.float32 or not query.is_cuda
    rest = k_dim - v_dim if in_keys else 0
    block_k, block_v, block_r = (max(16, triton.next_power_of_2(dim)) for dim in (k_dim - rest, v_dim, rest))
    tune = tuning(max(block_k, block_v), query.element_size(), in_keys)
    capacity = page_table.shape[1] * page
    new_lengths, table = new_lengths.to(torch.int32), page_table.stride(0)
    out = torch.empty(rows, heads, tokens, v_dim, dtype=query.dtype, device=device)
    lse = torch.empty(rows, heads, tokens, dtype=torch.float32, device=device)
    pools = (k_pages.stride(0), k_pages.stride(1), *((0, 0) if v_pages is None else v_pages.stride()[:2]))
    appended = max(1, min(32, 8192 // triton.next_power_of_2(k_dim)))  # tokens
    launch(
        _append,
        (triton.cdiv(tokens, appended), kv_heads, rows),
        key,
        value,
        k_pages,
        v_pages,
        slot_position,
        page_table,
        length,
        positions,
        new_lengths,
        table,
        *key.stride()[:3],
        *value.stride()[:3],
        positions.stride(0),
        *pools,
        K_DIM=k_dim,
        V_DIM=v_dim,
        IN_KEYS=in_keys,
        PAGE=page,
        TOKENS=appended,
        BLOCK_K=max(16, triton.next_power_of_2(k_dim)),
        BLOCK_V=block_v,
    )
    rule = {"SCALE": scale if softcap is not None else scale * LOG2E.value, "SOFTCAP": softcap, "WINDOW": window}
    rule |= {"CHUNKED": chunked, "SLOPES": slopes is not None, "SETS": sets_of(sinks, slopes, heads)}
    blocks = {"M": tune.m, "BLOCK": tune.block, "BLOCK_K": block_k, "UPCAST": upcast, "STAGES": tune.stages}
    blocks |= {"REST": rest, "BLOCK_R": block_r}
    warps = {"num_warps": tune.warps, "num_stages": tune.stages}
    launch(
        _forward,
        (triton.cdiv(tokens, tune.m), heads, rows),
        query,
        k_pages,
        v_pages,
        slot_position,
        page_table,
        length,
        positions,
        new_lengths,
        sinks,
        slopes,
        out,
        lse,
        tokens,
        table,
        *query.stride()[:3],
        positions.stride(0),
        *pools,
        SINKS=sinks is not None,
        HEADS=heads,
        GROUP=heads // kv_heads,
        K_DIM=k_dim,
        V_DIM=v_dim,
        IN_KEYS=in_keys,
        PAGE=page,
        BLOCK_V=block_v,
        **rule,
        **blocks,
        **warps,
    )
    if decay is not None:
        seen = torch.empty(rows, kv_heads, capacity, dtype=torch.float32, device=device)
        launch(
            _score,
            (triton.cdiv(capacity, tune.block), kv_heads, rows),
            query,
            k_pages,
            slot_position,
            page_table,
            length,
            positions,
            new_lengths,
            slopes,
            lse,
            seen,
            tokens,
            capacity,
            table,
            *query.stride()[:3],
            positions.stride(0),
            *pools[:2],
            PEAK=peak,
            KV_HEADS=kv_heads,
            GROUP=heads // kv_heads,
            K_DIM=k_dim,
            PAGE=page,
            **rule,
            **blocks,
            **warps,
        )
        launch(
            _fold,
            (triton.cdiv(capacity, 256), rows),
            seen,
            slot_mass,
            page_table,
            length,
            new_lengths,
            capacity,
            table,
            DECAY=decay,
            PEAK=peak,
            KV_HEADS=kv_heads,
            PAGE=page,
            SLOTS=256,
        )
    length += new_lengths
    return out
