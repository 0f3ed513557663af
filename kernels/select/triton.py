"""Selection on a GPU: `reference.select` bit for bit, one program a row, without a sort and without a host sync.

The breakpoint needs no order: v falls below v[0] / ratio from index c on, where c counts the scores that do not. The
top k of a row are found by bisection over the 31 bits of non-negative fp32 scores, whose bits are ordered as they are.
Equal scores rank the newer slot first, by a running count from the left. A row is read some 70 times, from L1 or L2:
512 rows of 8k tokens are 16 MiB.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

_SHORT, _LONG = 512, 2048  # slots taken at once in short and long rows: few sizes, since each is a kernel to compile
_WARPS = {_SHORT: 4, _LONG: 8}


@triton.jit
def _flags(position, sinks, protected):
    """Valid, sink and protected among slots with these positions; -1 is no token."""
    valid = position >= 0
    return valid, valid & (position < sinks), valid & (position < protected)


@triton.jit
def _bits(mass):
    """Fp32 scores as int32 keys >= 1 of the same order; 0 is left for slots that do not compete."""
    return tl.where(mass > 0, mass, 0.0).to(tl.int32, bitcast=True) + 1  # -0.0 becomes 0.0


@triton.jit
def _top(key, length, wanted, BLOCK: tl.constexpr):
    """The `wanted`-th largest of key [length] >= 0, and how many of the newest slots with just that key belong to it.

    Returns (t, skipped): the top `wanted` are key > t, and key == t but for the first `skipped` of those.
    """
    lane = tl.arange(0, BLOCK)
    t = wanted * 0
    for step in range(31):
        trial = t | (1 << (30 - step))
        reached = tl.zeros([BLOCK], tl.int32)
        for start in range(0, length, BLOCK):
            slot = start + lane
            reached += (tl.load(key + slot, mask=slot < length, other=0) >= trial).to(tl.int32)
        t = tl.where(tl.sum(reached) >= wanted, trial, t)
    reached = tl.zeros([BLOCK], tl.int32)
    for start in range(0, length, BLOCK):
        slot = start + lane
        reached += (tl.load(key + slot, mask=slot < length, other=0) >= t).to(tl.int32)
    return t, tl.sum(reached) - wanted


@triton.jit
def _share(count, ratio):
    """max(1, floor(ratio · count)), the product in fp64."""
    return tl.maximum((count.to(tl.float64) * ratio).to(tl.int32), 1)


@triton.jit
def _age(valid, total, before):
    """1 for the newest of a row's `total` tokens, `before` of them in earlier blocks; and that count after this one."""
    one = valid.to(tl.int32)
    return total - before - tl.cumsum(one) + 1, before + tl.sum(one)


@triton.jit
def _is_top(keys, slot, length, t, skipped, ties_before):
    """Whether slots belong to the top that `_top` described, `ties_before` of key t lie before; that count after."""
    key = tl.load(keys + slot, mask=slot < length, other=0)
    tie = (key == t).to(tl.int32)
    return (key > t) | ((tie > 0) & (ties_before + tl.cumsum(tie) > skipped)), ties_before + tl.sum(tie)


@triton.jit
def _tiers(position, keep, slot, length, sinks, protected_length, total, recent, reserve, before):
    """Order in which a cap takes tokens: 0 sinks, 1 reserve, 2 protected, 3 recent, 4 the rest; 5 what is not kept."""
    at = tl.load(position + slot, mask=slot < length, other=-1)
    valid, sink, protected = _flags(at, sinks, protected_length)
    age, before = _age(valid, total, before)
    kept = tl.load(keep + slot, mask=slot < length, other=0) != 0
    tier = tl.where(age <= recent, 3, 4)
    tier = tl.where(protected, 2, tier)
    tier = tl.where(age <= reserve, 1, tier)
    tier = tl.where(sink, 0, tier)
    return tl.where(kept, tier, 5), kept, before


@triton.jit
def _candidates(position, slot, length, sinks, INCLUDE_SINKS: tl.constexpr):
    """Which slots hold a token, and which of those compete."""
    at = tl.load(position + slot, mask=slot < length, other=-1)
    valid, sink, _ = _flags(at, sinks, 0)
    return valid, valid if INCLUDE_SINKS else valid & ~sink


@triton.jit
def _survey(mass, position, keys, length, sinks, INCLUDE_SINKS: tl.constexpr, BLOCK: tl.constexpr):
    """A row's tokens, its candidates, and their highest score in fp64; writes the candidates' keys."""
    lane = tl.arange(0, BLOCK)
    tokens, candidates = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
    best = tl.full([BLOCK], 0.0, tl.float32)
    for start in range(0, length, BLOCK):
        slot = start + lane
        valid, candidate = _candidates(position, slot, length, sinks, INCLUDE_SINKS)
        score = tl.load(mass + slot, mask=candidate, other=0.0)
        tokens += valid.to(tl.int32)
        candidates += candidate.to(tl.int32)
        best = tl.maximum(best, score)
        tl.store(keys + slot, tl.where(candidate, _bits(score), 0), mask=slot < length)
    return tl.sum(tokens), tl.sum(candidates), tl.max(best).to(tl.float64)


@triton.jit
def _breakpoint(
    mass, position, length, sinks, rivals, highest, ratio, segments, INCLUDE_SINKS: tl.constexpr, BLOCK: tl.constexpr
):
    """The first boundary ceil(i · rivals / segments), 0 < i < segments, from which on scores fell, and if it exists."""
    lane = tl.arange(0, BLOCK)
    near = tl.zeros([BLOCK], tl.int32)
    for start in range(0, length, BLOCK):
        slot = start + lane
        _, candidate = _candidates(position, slot, length, sinks, INCLUDE_SINKS)
        score = tl.load(mass + slot, mask=candidate, other=0.0).to(tl.float64)
        near += (candidate & ~(highest > ratio * score)).to(tl.int32)
    i = segments * (tl.maximum(tl.sum(near), 1) - 1) // tl.maximum(rivals, 1) + 1
    cut = (i * rivals + segments - 1) // segments
    return cut, (i < segments) & (cut < rivals)


@triton.jit
def _select(
    mass,  # [rows, n] fp32
    position,  # [rows, n] int32
    lengths,  # [rows] int64
    protected_lengths,  # [rows] int64
    caps,  # [rows] int64, read if CAPPED
    ratios,  # [2] fp64: sparse_ratio, recent_ratio; a Python float would be fp32
    keep,  # [rows, n] int8, zeroed
    broken,  # [rows] int8, zeroed
    keys,  # [rows, n] int32, scratch
    n,
    segments,
    sinks,
    CAPPED: tl.constexpr,
    INCLUDE_SINKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + row).to(tl.int32)
    if length == 0:
        return
    mass += row * n
    position += row * n
    keep += row * n
    keys += row * n
    protected_length = tl.load(protected_lengths + row)
    lane = tl.arange(0, BLOCK)

    total, rivals, highest = _survey(mass, position, keys, length, sinks, INCLUDE_SINKS, BLOCK)
    recent = _share(total, tl.load(ratios + 1))
    cut, broke = _breakpoint(
        mass, position, length, sinks, rivals, highest, tl.load(ratios), segments, INCLUDE_SINKS, BLOCK
    )
    tl.store(broken + row, broke.to(tl.int8))
    tl.debug_barrier()  # keys are read by other threads than wrote them

    t, skipped, count = length * 0, length * 0, length * 0
    if broke:
        t, skipped = _top(keys, length, cut, BLOCK)
    ties_before, tokens_before = length * 0, length * 0
    for start in range(0, length, BLOCK):
        slot = start + lane
        at = tl.load(position + slot, mask=slot < length, other=-1)
        valid, sink, protected = _flags(at, sinks, protected_length)
        salient, ties_before = _is_top(keys, slot, length, t, skipped, ties_before)
        age, tokens_before = _age(valid, total, tokens_before)
        kept = valid & ((broke == 0) | salient | sink | protected | (age <= recent))
        tl.store(keep + slot, kept.to(tl.int8), mask=slot < length)
        count += tl.sum(kept.to(tl.int32))
    if CAPPED:
        cap = tl.load(caps + row).to(tl.int32)
        if count > cap:
            reserve = _share(cap, tl.load(ratios + 1))
            tl.debug_barrier()
            _trim(mass, position, keep, keys, length, sinks, protected_length, total, recent, reserve, cap, BLOCK)


@triton.jit
def _trim(
    mass, position, keep, keys, length, sinks, protected_length, total, recent, reserve, cap, BLOCK: tl.constexpr
):
    """Cut a row's `keep` down to `cap` tokens: whole tiers, then the best of the tier that does not fit."""
    lane = tl.arange(0, BLOCK)
    first, second = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
    third, fourth = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
    before = length * 0
    for start in range(0, length, BLOCK):
        slot = start + lane
        tier, _, before = _tiers(position, keep, slot, length, sinks, protected_length, total, recent, reserve, before)
        first += (tier <= 0).to(tl.int32)
        second += (tier <= 1).to(tl.int32)
        third += (tier <= 2).to(tl.int32)
        fourth += (tier <= 3).to(tl.int32)
    upto0, upto1, upto2, upto3 = tl.sum(first), tl.sum(second), tl.sum(third), tl.sum(fourth)
    # The tier that does not fit, and the tokens of those ahead of it.
    partial = (upto0 <= cap).to(tl.int32) + (upto1 <= cap) + (upto2 <= cap) + (upto3 <= cap)
    ahead = tl.where(partial == 1, upto0, tl.where(partial == 2, upto1, tl.where(partial == 3, upto2, upto3)))
    ahead = tl.where(partial == 0, 0, ahead)
    newest_first = (partial == 1) | (partial == 3)

    before = length * 0
    for start in range(0, length, BLOCK):
        slot = start + lane
        tier, kept, before = _tiers(
            position, keep, slot, length, sinks, protected_length, total, recent, reserve, before
        )
        score = tl.load(mass + slot, mask=kept, other=0.0)
        key = tl.where(newest_first, slot + 1, _bits(score))
        tl.store(keys + slot, tl.where(tier == partial, key, 0), mask=slot < length)
        tl.store(keep + slot, (tier < partial).to(tl.int8), mask=slot < length)
    tl.debug_barrier()  # keys are read by other threads than wrote them

    t, skipped = _top(keys, length, cap - ahead, BLOCK)
    ties_before = length * 0
    for start in range(0, length, BLOCK):
        slot = start + lane
        best, ties_before = _is_top(keys, slot, length, t, skipped, ties_before)
        kept = tl.load(keep + slot, mask=slot < length, other=0)
        tl.store(keep + slot, (best | (kept != 0)).to(tl.int8), mask=slot < length)


def select(
    mass: Tensor,
    position: Tensor,
    length: Tensor,
    *,
    sparse_ratio: float,
    segments: int,
    sink_tokens: int,
    recent_ratio: float,
    protected_length: Tensor,
    cap: Tensor | None = None,
    include_sinks: bool = False,
) -> tuple[Tensor, Tensor]:
    """Arguments and results of `reference.select`; scores are fp32, and nothing is waited for."""
    rows, n = mass.shape
    keep = torch.zeros(rows, n, dtype=torch.int8, device=mass.device)
    broke = torch.zeros(rows, dtype=torch.int8, device=mass.device)
    assert n * segments < 1 << 31, "boundaries are computed in int32"
    if rows and n:
        _select[(rows,)](
            mass.float().contiguous(),
            position.int().contiguous(),
            length.long().contiguous(),
            protected_length.long().contiguous(),
            length if cap is None else cap.long().contiguous(),
            _ratios(float(sparse_ratio), float(recent_ratio), mass.device),
            keep,
            broke,
            torch.empty(rows, n, dtype=torch.int32, device=mass.device),
            n,
            segments,
            sink_tokens,
            CAPPED=cap is not None,
            INCLUDE_SINKS=include_sinks,
            BLOCK=_block(n),
            num_warps=_WARPS[_block(n)],
        )
    return keep.view(torch.bool), broke.view(torch.bool)


@triton.jit
def _hoyer(mass, lengths, sparsity, n, BLOCK: tl.constexpr):
    """One row's Hoyer sparsity, summed in fp64: mass [rows, n] fp32, lengths [rows] int64, sparsity [rows] fp32."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    total, squares = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for start in range(0, n, BLOCK):
        score = tl.load(mass + row * n + start + lane, mask=start + lane < n, other=0.0).to(tl.float64)
        total += score
        squares += score * score
    length = tl.load(lengths + row)
    l1, l2, root = tl.sum(total), tl.sqrt(tl.sum(squares)), tl.sqrt(length.to(tl.float64))
    defined = (length > 1) & (l2 > 0)
    value = (root - l1 / tl.where(defined, l2, 1.0)) / tl.where(defined, root - 1, 1.0)
    value = tl.minimum(tl.maximum(value, 0.0), 1.0)
    tl.store(sparsity + row, tl.where(defined, value, 0.0).to(tl.float32))


def hoyer_sparsity(mass: Tensor, length: Tensor) -> Tensor:
    """Arguments and result of `reference.hoyer_sparsity`, to fp32 rounding; scores are fp32."""
    rows, n = mass.shape
    sparsity = torch.empty(rows, dtype=torch.float32, device=mass.device)
    if rows:
        mass, length = mass.float().contiguous(), length.long().contiguous()
        _hoyer[(rows,)](mass, length, sparsity, n, BLOCK=_block(n), num_warps=_WARPS[_block(n)])
    return sparsity


def _block(n: int) -> int:
    return _SHORT if n <= _SHORT else _LONG


@lru_cache(maxsize=64)
def _ratios(sparse_ratio: float, recent_ratio: float, device: torch.device) -> Tensor:
    """On the device, sent there once: a copy from the host would make every round wait."""
    return torch.tensor([sparse_ratio, recent_ratio], dtype=torch.float64, device=device)
