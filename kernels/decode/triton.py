"""Cached attention of one new token a row, in Triton: append, attend over the paged cache, and score its slots.

Two launches. `_attend` streams keys and values once; `add_mass` turns the probabilities that it left behind, relative
to running maxima, into exact ones, now that every row's log-sum-exp is known. The truth is `attention.reference`.

Work is shared out in blocks of slots, so that any mix of lengths keeps every multiprocessor equally busy: the blocks of
all (row, KV head) items stand in one line, and each program takes an equal run of it. A run may end inside an item;
whoever finishes an item last combines its parts, in order, so the result does not depend on who that is. The grid
depends on the device alone and lengths are read on the device: a captured CUDA graph stays valid while a cache grows
and shrinks.

Where values are the first channels of the keys, as with a cached latent, a block of keys is read once for both products
and its other channels (the rotated part) as a second, narrower block: 512 and 64 in DeepSeek V3, not 1,024. The query
heads of a KV head are then many, and shared out in tiles that a program's registers hold: to the kernel, a tile is a KV
head with fewer query heads, and only where keys and values lie tells which tiles share them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lethe_compile.kernels.attention.blocks import FLOOR, LOG2E, dot, fold, page_ids, scores, sets_of, tanh
from lethe_compile.kernels.decode.l2 import set_aside
from lethe_compile.kernels.decode.score import add_mass, keep
from lethe_compile.kernels.launch import launch


@triton.jit(do_not_specialize=["rows", "table_stride", "position_row"])
def _attend(
    query,  # [rows, heads, 1, k_dim]
    key,  # [rows, kv_heads, 1, k_dim]
    value,  # [rows, kv_heads, 1, v_dim]
    k_pages,
    v_pages,  # None where IN_KEYS
    k_rows,  # with BULK, descriptors of the pages as [pages * kv_heads * PAGE, dim], else None
    v_rows,
    slot_position,
    page_table,
    length,
    positions,
    new_lengths,
    sinks,
    slopes,
    out,  # [rows, heads, v_dim]
    weight,  # [rows, kv_heads, capacity, G] exp2(score - block_max), in the dtype that probabilities are kept in
    block_max,  # [rows, kv_heads, capacity / BLOCK, G] float32 running maximum that a block's weights are relative to
    lse,  # [rows, heads] float32, base 2
    part_out,  # [programs + items, G, v_dim] float32
    part_stat,  # [programs + items, 2, G] float32: maximum and sum
    counter,  # [1 + items] int32, zero before and after
    rows,
    capacity,
    table_stride,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    position_row,
    k_page,
    k_page_head,
    v_page,
    v_page_head,
    SCALE: tl.constexpr,  # times log2(e) where there is no softcap
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNKED: tl.constexpr,
    SINKS: tl.constexpr,
    SLOPES: tl.constexpr,
    SCORED: tl.constexpr,
    KV_HEADS: tl.constexpr,  # times TILES
    GROUP: tl.constexpr,  # query heads of a tile
    TILES: tl.constexpr,  # that share a KV head
    SETS: tl.constexpr,  # of sinks and slopes; rows take turns
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    IN_KEYS: tl.constexpr,  # a value is the first V_DIM channels of its key
    PAGE: tl.constexpr,
    ROWS: tl.constexpr,  # a power of two >= rows
    BLOCK: tl.constexpr,
    M: tl.constexpr,  # a power of two >= max(16, GROUP)
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,  # of what a key has beyond its value, where IN_KEYS
    LEAST: tl.constexpr,
    UPCAST: tl.constexpr,
    KEEP: tl.constexpr,  # weights in L2, see `keep`
    BULK: tl.constexpr,  # load full blocks by the tensor memory accelerator
    STAGES: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    each = tl.arange(0, ROWS)
    lengths = tl.load(length + each, mask=each < rows, other=0)
    added = tl.load(new_lengths + each, mask=each < rows, other=0)
    # Whoever is the last to have read the lengths may advance them; it does so at the end, when the answer has come.
    tl.debug_barrier()
    arrived = tl.atomic_add(counter, 1, sem="acq_rel")
    blocks = tl.where(added > 0, tl.maximum((lengths + BLOCK - 1) // BLOCK, 1), 0)
    ends = tl.cumsum(blocks, 0) * KV_HEADS
    total = tl.sum(blocks, 0) * KV_HEADS
    share = tl.maximum((total + programs - 1) // programs, LEAST)

    m, d, e, n = tl.arange(0, M), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK)
    REST: tl.constexpr = K_DIM - V_DIM if IN_KEYS else 0
    r = tl.arange(0, BLOCK_R)
    in_group, in_k, in_v, in_r = m < GROUP, d < K_DIM - REST, e < V_DIM, r < REST
    for row in tl.range(program, rows, programs, num_stages=1):  # rows that take no part give zeros
        if tl.sum(tl.where(each == row, added, 0), 0) == 0:
            for head in tl.range(0, KV_HEADS, num_stages=1):
                idle = out + (row * KV_HEADS * GROUP + (head * GROUP + m)[:, None]) * V_DIM + e[None, :]
                nothing = tl.zeros([M, BLOCK_V], out.dtype.element_ty)
                tl.store(idle, nothing, mask=in_group[:, None] & in_v[None, :])
    at = program * share
    stop = tl.minimum(at + share, total)
    while at < stop:
        row = tl.sum((ends <= at).to(tl.int32), 0)
        here = each == row
        item_blocks = tl.sum(tl.where(here, blocks, 0), 0)
        row_start = tl.sum(tl.where(here, ends - blocks * KV_HEADS, 0), 0)
        old = tl.sum(tl.where(here, lengths, 0), 0)
        head = (at - row_start) // item_blocks
        item = row * KV_HEADS + head
        kv_head = head // TILES
        item_start = row_start + head * item_blocks
        first = at - item_start
        last = tl.minimum(item_blocks, first + stop - at)

        q_at = query + row.to(tl.int64) * q_row + (head * GROUP + m)[:, None] * q_head + d[None, :]
        q = tl.load(q_at, mask=in_group[:, None] & in_k[None, :], other=0.0)
        q_rest = q
        if REST > 0:
            rest_at = query + row.to(tl.int64) * q_row + (head * GROUP + m)[:, None] * q_head + (V_DIM + r)[None, :]
            q_rest = tl.load(rest_at, mask=in_group[:, None] & in_r[None, :], other=0.0)
        now = tl.load(positions + row * position_row)
        slope = tl.zeros([M], tl.float32)
        if SLOPES:
            slope_at = slopes + (row % SETS * KV_HEADS + head) * GROUP + m
            slope = tl.load(slope_at, mask=in_group, other=0.0).to(tl.float32) * LOG2E
        table = page_table + row.to(tl.int64) * table_stride
        weight_at = weight + item.to(tl.int64) * capacity * GROUP
        max_at = block_max + item.to(tl.int64) * (capacity // BLOCK) * GROUP

        top = tl.full([M], FLOOR, tl.float32)
        mass = tl.zeros([M], tl.float32)
        acc = tl.zeros([M, BLOCK_V], tl.float32)
        ends_here = last == item_blocks
        k_from, k_to = key + row.to(tl.int64) * k_row + kv_head * k_head, k_pages + kv_head * k_page_head
        if IN_KEYS:  # begin with the new token, while q is in registers and sums are not
            k_to += tl.load(table + old // PAGE).to(tl.int64) * k_page + (old % PAGE) * K_DIM
            stored = ends_here & (head % TILES == 0)
            k_new = tl.load(k_from + d, mask=in_k & ends_here, other=0.0)
            tl.store(k_to + d, k_new, mask=in_k & stored)
            s_new = tl.sum(q.to(tl.float32) * k_new.to(tl.float32)[None, :], 1)
            if REST > 0:
                r_new = tl.load(k_from + V_DIM + r, mask=in_r & ends_here, other=0.0)
                tl.store(k_to + V_DIM + r, r_new, mask=in_r & stored)
                s_new += tl.sum(q_rest.to(tl.float32) * r_new.to(tl.float32)[None, :], 1)
            s_new *= SCALE
            if SOFTCAP is not None:
                s_new = tanh(s_new / SOFTCAP) * (SOFTCAP * LOG2E)
            top = tl.where(ends_here, s_new, top)
            mass = tl.where(ends_here, 1.0, mass)
            acc += k_new.to(tl.float32)[None, :]  # zero where it is not the last part

        begin = first
        pages = page_ids(table, begin, old, n, PAGE, BLOCK)
        if BULK:
            begin = tl.maximum(first, tl.minimum(last, old // BLOCK))
            for block in tl.range(first, begin, num_stages=STAGES):
                slot = block * BLOCK + n
                where = slot_position + (pages.to(tl.int64) * PAGE + slot % PAGE)
                source = ((pages * (KV_HEADS // TILES) + kv_head) * PAGE + block * BLOCK % PAGE).to(tl.int32)
                pages = page_ids(table, block + 1, old, n, PAGE, BLOCK)  # one ahead, or loads could not overlap
                k, v = k_rows.load([source, 0]).T, v_rows.load([source, 0])
                s = dot(q, k, UPCAST)
                s = scores(s, where, now, slope, SCALE, SOFTCAP, WINDOW, CHUNKED, SLOPES)
                top, mass, acc, p = fold(top, mass, acc, s, v, UPCAST)
                if SCORED:
                    keep(weight_at, max_at, block, slot, m, p, top, old, GROUP, KEEP)
            pages = page_ids(table, begin, old, n, PAGE, BLOCK)
        for block in tl.range(begin, last, num_stages=1 if BULK else STAGES):
            slot = block * BLOCK + n
            live = slot < old
            page, offset = pages.to(tl.int64), slot % PAGE
            pages = page_ids(table, block + 1, old, n, PAGE, BLOCK)
            k_at = k_pages + (page * k_page + kv_head * k_page_head) + offset * K_DIM
            filled = live  # where a slot is no token, zero weights would not silence a NaN
            if IN_KEYS:
                k = tl.load(k_at[None, :] + d[:, None], mask=in_k[:, None] & filled[None, :], other=0.0)
            elif K_DIM == BLOCK_K:  # what lies beyond the length is masked as a score
                k = tl.load(k_at[None, :] + d[:, None])
            else:
                k = tl.load(k_at[None, :] + d[:, None], mask=in_k[:, None], other=0.0)
            where = slot_position + page * PAGE + offset
            s = dot(q, k, UPCAST)
            if REST > 0:
                k_rest = tl.load(k_at[None, :] + (V_DIM + r)[:, None], mask=in_r[:, None] & filled[None, :], other=0.0)
                s += dot(q_rest, k_rest, UPCAST)
            s = scores(s, where, now, slope, SCALE, SOFTCAP, WINDOW, CHUNKED, SLOPES)
            s = tl.where(live[None, :], s, float("-inf"))
            if IN_KEYS:
                v = tl.trans(k)
            else:
                v_at = v_pages + (page * v_page + kv_head * v_page_head) + offset * V_DIM
                in_value = filled[:, None]
                if V_DIM != BLOCK_V:
                    in_value = in_value & in_v[None, :]
                v = tl.load(v_at[:, None] + e[None, :], mask=in_value, other=0.0)
            top, mass, acc, p = fold(top, mass, acc, s, v, UPCAST)
            if SCORED:
                keep(weight_at, max_at, block, slot, m, p, top, old, GROUP, KEEP)

        if ends_here:  # the new token, from registers: nothing has to be written before it is read
            row_page = tl.load(table + old // PAGE).to(tl.int64)
            if head == 0:
                tl.store(slot_position + row_page * PAGE + old % PAGE, now.to(tl.int32))
            if not IN_KEYS:
                k_new = tl.load(k_from + d, mask=in_k, other=0.0)
                v_new = tl.load(value + row.to(tl.int64) * v_row + kv_head * v_head + e, mask=in_v, other=0.0)
                k_to += row_page * k_page + (old % PAGE) * K_DIM
                v_to = v_pages + row_page * v_page + kv_head * v_page_head + (old % PAGE) * V_DIM + e
                tl.store(k_to + d, k_new, mask=in_k & (head % TILES == 0))
                tl.store(v_to, v_new, mask=in_v & (head % TILES == 0))
                s_new = tl.sum(q.to(tl.float32) * k_new.to(tl.float32)[None, :], 1) * SCALE
                if SOFTCAP is not None:
                    s_new = tanh(s_new / SOFTCAP) * (SOFTCAP * LOG2E)
                higher = tl.maximum(top, s_new)
                p_new = tl.exp2(s_new - higher)
                fade = tl.exp2(top - higher)
                mass = mass * fade + p_new
                acc = acc * fade[:, None] + p_new[:, None] * v_new.to(tl.float32)[None, :]
                top = higher
            if SCORED:  # the score itself, kept with the log-sum-exp
                tl.store(lse + (rows + row) * KV_HEADS * GROUP + head * GROUP + m, s_new, mask=in_group)

        begun, ended = item_start // share, (item_start + item_blocks - 1) // share  # programs that have a part
        part = (program + item).to(tl.int64)  # unique: each step along the line advances at least one of the two
        done = begun == ended
        if not done:
            stat_at = part_stat + part * (2 * M) + m
            tl.store(stat_at, top)
            tl.store(stat_at + M, mass)
            tl.store(part_out + part * (M * BLOCK_V) + m[:, None] * BLOCK_V + e[None, :], acc, mask=in_group[:, None])
            tl.debug_barrier()  # every thread's stores, before the one atomic that publishes them
            done = tl.atomic_add(counter + 1 + item, 1, sem="acq_rel") == ended - begun
            if done:
                tl.store(counter + 1 + item, 0)
                top = tl.full([M], FLOOR, tl.float32)
                mass = tl.zeros([M], tl.float32)
                acc = tl.zeros([M, BLOCK_V], tl.float32)
                for other in tl.range(begun, ended + 1, num_stages=1):
                    part = (other + item).to(tl.int64)
                    part_top = tl.load(part_stat + part * (2 * M) + m, cache_modifier=".cg")
                    part_mass = tl.load(part_stat + part * (2 * M) + M + m, cache_modifier=".cg")
                    part_at = part_out + part * (M * BLOCK_V) + m[:, None] * BLOCK_V + e[None, :]
                    part_acc = tl.load(part_at, mask=in_group[:, None], other=0.0, cache_modifier=".cg")
                    higher = tl.maximum(top, part_top)
                    fade, gain = tl.exp2(top - higher), tl.exp2(part_top - higher)
                    mass = mass * fade + part_mass * gain
                    acc = acc * fade[:, None] + part_acc * gain[:, None]
                    top = higher
        if done:
            if SINKS:
                sink_at = sinks + (row % SETS * KV_HEADS + head) * GROUP + m
                sink = tl.load(sink_at, mask=in_group, other=0.0).to(tl.float32) * LOG2E
                higher = tl.maximum(top, sink)
                fade = tl.exp2(top - higher)
                mass = mass * fade + tl.exp2(sink - higher)
                acc = acc * fade[:, None]
                top = higher
            result = acc / mass[:, None]
            out_at = out + (row.to(tl.int64) * KV_HEADS * GROUP + (head * GROUP + m)[:, None]) * V_DIM + e[None, :]
            tl.store(out_at, result.to(out.dtype.element_ty), mask=in_group[:, None] & in_v[None, :])
            if SCORED:
                lse_at = lse + row * KV_HEADS * GROUP + head * GROUP + m
                tl.store(lse_at, top + tl.log2(mass), mask=in_group)
        at += last - first

    if arrived == programs - 1:
        tl.store(counter, 0)
        tl.store(length + each, lengths + added, mask=(each < rows) & (added > 0))


_MANY_ITEMS = 768
_SUMS = 64 * 512  # of a program: half of a multiprocessor's registers
REGISTERS = 255  # a thread may have: few threads stream best, so none has to spill for the sake of more of them


@dataclass(frozen=True)
class Tuning:
    """How `_attend` is launched.

    Attributes:
        block: slots that are read together.
        programs: of one multiprocessor.
        warps: of a program.
        stages: blocks under way, the one at work included.
        bulk: load full blocks by Hopper's tensor memory accelerator, where pages hold whole blocks.
        least: blocks a program takes at least.
    """

    block: int
    programs: int
    warps: int
    stages: int
    bulk: bool = False
    least: int = 2


def tuning(
    k_dim: int,
    v_dim: int,
    itemsize: int,
    page: int,
    items: int = 1,
    group: int = 1,
    in_keys: bool = False,
    bulk: bool = True,
) -> Tuning:
    """The fastest of those tried on an H100 with heads of 128 in half precision; others get blocks of as many bytes.

    `items` are pairs of row and KV head: where there are many, one program's stream covers the end of another's item.
    Without `bulk` none uses the tensor memory accelerator.

    Tried on 16 rows of 8192 tokens, where what stands here took 187 µs without scores, and slower: 2 to 8 programs a
    multiprocessor (193 to 201), a softmax of each warp's own by 3-D products, which spares barriers (194 to 200),
    blocks of 128, programmatic dependent launch (188 to 193, no gain with scores), scoring on a second stream.
    """
    if in_keys:
        return _latent_tuning(k_dim, v_dim, itemsize, group)
    token = (triton.next_power_of_2(k_dim) + triton.next_power_of_2(v_dim)) * itemsize
    # Float32 products take registers. A power of two, as blocks must be: dimensions that differ pad to no such sum.
    scale = triton.next_power_of_2(max(1, token * (2 if itemsize > 2 else 1) // 512))
    if page >= 64:
        if token < 512:
            return Tuning(64, programs=2, warps=4, stages=3)
        if bulk and itemsize == 2 and scale == 1:
            programs, stages = (1, 4) if items < _MANY_ITEMS else (2, 3)
            return Tuning(64, programs, warps=4, stages=stages, bulk=True)
        return Tuning(max(16, 64 // scale), programs=1, warps=8, stages=4 if scale <= 4 else 2)
    if itemsize > 2:
        return Tuning(32 if token <= 1024 else 16, programs=1, warps=4, stages=3 if token <= 1024 else 2)
    return Tuning(max(16, 32 // scale), programs=2, warps=4, stages=4 if scale <= 2 else 2)


def _latent_tuning(k_dim: int, v_dim: int, itemsize: int, group: int) -> Tuning:
    """Where values are channels of the keys: chosen so that blocks fit; not yet measured on a GPU."""
    width = (_padded(v_dim) + _padded(k_dim - v_dim)) * itemsize  # bytes of a key
    wide = _padded(group) * _padded(v_dim) >= _SUMS // 2
    if itemsize > 2:
        return Tuning(16, programs=1, warps=8 if wide else 4, stages=2 if width <= 1024 else 1)
    return Tuning(32 if width > 640 else 64, programs=1, warps=8 if wide else 4, stages=2 if wide else 3)


@dataclass(frozen=True)
class Fixed:
    """What a launch that is traced, for any number of rows and slots, has to know ahead.

    Attributes:
        most_rows: a power of two.
        counter: ``[1 + most_rows * kv_heads * tiles]`` int32 zeros, or more of them, which the launch leaves zero.
    """

    most_rows: int
    counter: Tensor


def fixed_counter(most_rows: int, heads: int, kv_heads: int, v_dim: int, itemsize: int) -> int:
    """Size of `Fixed.counter`."""
    return 1 + most_rows * kv_heads * _tiles(heads // kv_heads, v_dim, itemsize)


_workspaces: dict[tuple[torch.device, int], Tensor] = {}


def _counter(device: torch.device, items: int) -> Tensor:
    """[1 + items] zeros that every launch leaves zero; kept for good, since captured graphs hold their address."""
    size = triton.next_power_of_2(1 + items)
    if (device, size) not in _workspaces:
        _workspaces[device, size] = torch.zeros(size, dtype=torch.int32, device=device)
    return _workspaces[device, size]


def _rows(pages: Tensor, block: int) -> TensorDescriptor:
    """Descriptor of the slots of [pages, kv_heads, page, dim], one under the other; a load takes `block` of them."""
    dim = pages.shape[-1]
    return TensorDescriptor.from_tensor(pages.view(-1, dim), [block, _padded(dim)])


def _padded(size: int) -> int:
    """The block that holds it: a power of two, and no less than a product takes."""
    return max(16, int(triton.next_power_of_2(size)))


def _tiles(group: int, v_dim: int, itemsize: int) -> int:
    """Tiles of the query heads of one KV head: as few as let a program hold its sums [heads, v_dim] in registers."""
    most = max(16, (_SUMS if itemsize == 2 else _SUMS // 4) // _padded(v_dim))
    return next(tiles for tiles in range(1, group + 1) if group % tiles == 0 and group // tiles <= most)


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
    tune: Tuning | None = None,
    fixed: Fixed | None = None,
) -> Tensor:
    """Shapes, effects and result as `attention.reference.attention` with T = 1; the last dimension is contiguous.

    A query's position is at least that of every retained key, as it is while decoding. One stream of a device at a
    time: launches share a workspace. Scores of a half-precision model come from probabilities kept with 11 bits.
    With `fixed`, nothing that is compiled depends on the number of rows and slots, so that it can be traced; torch's
    analysis of kernels knows neither descriptors nor assembly, so it does without.
    """
    rows, heads, _, k_dim = query.shape
    kv_heads, page, v_dim, in_keys = k_pages.shape[1], k_pages.shape[2], value.shape[3], v_pages is None
    tiles = _tiles(heads // kv_heads, v_dim, query.element_size())
    group, items, parts = heads // kv_heads // tiles, rows * kv_heads * tiles, kv_heads * tiles
    device, interpreted = query.device, not query.is_cuda
    if tune is None:
        known = 1 if fixed is not None else items
        tune = tuning(k_dim, v_dim, query.element_size(), page, known, group, in_keys, bulk=fixed is None)
    block, m, block_v = tune.block, _padded(group), _padded(v_dim)
    programs = tune.programs * (2 if interpreted else torch.cuda.get_device_properties(device).multi_processor_count)
    capacity = -(-page_table.shape[1] * page // block) * block

    scored = decay is not None
    if scored and fixed is None and not interpreted and not torch.cuda.is_current_stream_capturing():
        set_aside(device)
    exact = query.dtype == torch.float32
    bulk = (
        tune.bulk
        and fixed is None
        and not in_keys
        and page % block == 0
        and (interpreted or torch.cuda.get_device_capability(device)[0] >= 9)
    )
    float32 = partial(torch.empty, dtype=torch.float32, device=device)
    out = torch.empty(rows, heads, 1, v_dim, dtype=query.dtype, device=device)
    slots = items * capacity if scored else 0
    weight = torch.empty(slots * group, dtype=torch.float32 if exact else torch.float16, device=device)
    block_max = float32(slots // block * group)
    lse = float32(2, rows, heads)
    part_out = float32(programs + items, m, block_v)
    part_stat = float32(programs + items, 2, m)
    launch(
        _attend,
        (programs,),
        query,
        key,
        value,
        k_pages,
        v_pages,
        _rows(k_pages, block) if bulk else None,
        _rows(v_pages, block) if bulk and v_pages is not None else None,
        slot_position,
        page_table,
        length,
        positions,
        new_lengths,
        sinks,
        slopes,
        out,
        weight,
        block_max,
        lse,
        part_out,
        part_stat,
        _counter(device, items) if fixed is None else fixed.counter,
        rows,
        capacity,
        page_table.stride(0),
        query.stride(0),
        query.stride(1),
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        positions.stride(0),
        k_pages.stride(0),
        k_pages.stride(1),
        *((0, 0) if v_pages is None else (v_pages.stride(0), v_pages.stride(1))),
        SCALE=scale if softcap is not None else scale * LOG2E.value,
        SOFTCAP=softcap,
        WINDOW=window,
        CHUNKED=chunked,
        SINKS=sinks is not None,
        SLOPES=slopes is not None,
        SCORED=scored,
        KV_HEADS=parts,
        GROUP=group,
        TILES=tiles,
        SETS=sets_of(sinks, slopes, heads),
        K_DIM=k_dim,
        V_DIM=v_dim,
        IN_KEYS=in_keys,
        PAGE=page,
        ROWS=triton.next_power_of_2(rows) if fixed is None else fixed.most_rows,
        BLOCK=block,
        M=m,
        BLOCK_K=block_v if in_keys else _padded(k_dim),
        BLOCK_V=block_v,
        BLOCK_R=_padded(k_dim - v_dim) if in_keys else 16,
        LEAST=tune.least,
        UPCAST=exact or interpreted,
        KEEP=fixed is None and not (exact or interpreted),
        BULK=bulk,
        STAGES=tune.stages,
        num_warps=tune.warps,
        num_stages=tune.stages,
        maxnreg=None if exact else REGISTERS,
    )
    if decay is not None:
        span = max(16, min(128, 2048 // triton.next_power_of_2(group)))
        launch(
            add_mass,
            (triton.cdiv(capacity, span), rows),
            weight,
            block_max,
            lse,
            slot_mass,
            page_table,
            length,
            new_lengths,
            rows,
            capacity,
            page_table.stride(0),
            DECAY=decay,
            PEAK=peak,
            KV_HEADS=parts,
            GROUP=group,
            PAGE=page,
            BLOCK=block,
            SLOTS=span,
            G=triton.next_power_of_2(group),
            num_warps=4,
        )
    return out
