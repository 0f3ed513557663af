"""`reference.select` without a sort, in core aten only: for programs that run where a sort or a long top-k cannot.

As in the Triton kernel, the breakpoint needs no order, since v falls below v[0] / ratio from index c on, where c counts
the scores that do not; and the top k of a row are found by bisection over the 31 bits of non-negative fp32 scores.
No program format has a bit cast that every runtime takes, so the bits are set by exact arithmetic on powers of two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lethe_compile.kernels.select.reference import held

_EXPONENTS = (128, 64, 32, 16, 8, 4, 2, 1)
_MANTISSA = 23


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
    """As `reference.select`, for scores in float32, bit for bit."""
    valid = held(position, length)
    sink = valid & (position < sink_tokens)
    protected = valid & (position < protected_length.unsqueeze(1))
    return choose(mass, valid, sink, protected, sparse_ratio, segments, recent_ratio, cap, include_sinks)


def choose(
    mass: Tensor,
    valid: Tensor,
    sink: Tensor,
    protected: Tensor,
    sparse_ratio: float,
    segments: int,
    recent_ratio: float,
    cap: Tensor | None,
    include_sinks: bool,
) -> tuple[Tensor, Tensor]:
    """As `reference.choose`, bit for bit."""
    candidate = valid if include_sinks else valid & ~sink
    cut, broke = _breakpoint(mass, candidate, sparse_ratio, segments)
    salient = _top(mass, candidate, cut)

    age = _from_right(valid)  # [R, N] 1 = newest token
    recent = valid & (age <= _share(valid.sum(1), recent_ratio))
    keep = valid & (salient | sink | recent | protected | ~broke.unsqueeze(1))
    if cap is None:
        return keep, broke
    reserve = valid & (age <= _share(cap, recent_ratio))
    return _within(cap, keep, mass, age, (sink, reserve, protected, recent)), broke


def _breakpoint(mass: Tensor, candidate: Tensor, sparse_ratio: float, segments: int) -> tuple[Tensor, Tensor]:
    """First segment boundary at which the candidates' scores fell `sparse_ratio` times, [R], and whether there is one.

    The boundary is 0 where there is none.
    """
    score = mass.masked_fill(~candidate, 0.0).double()  # exact product with the ratio
    stands = candidate & ~(score.amax(1, keepdim=True) > sparse_ratio * score)
    count, standing = candidate.sum(1, keepdim=True), stands.sum(1, keepdim=True)  # [R, 1]
    step = torch.arange(1, segments, device=mass.device)
    boundary = (step * count + segments - 1) // segments  # [R, segments - 1], k_i, ascending
    falls = (boundary < count) & (boundary >= standing)
    first = torch.where(falls, boundary, count).amin(1)
    broke = first < count.squeeze(1)
    return torch.where(broke, first, 0), broke


def _within(cap: Tensor, keep: Tensor, mass: Tensor, age: Tensor, tiers: tuple[Tensor, ...]) -> Tensor:
    """The first `cap` [R] of `keep` [R, N]: by tiers, those of one by age in the 2nd and 4th, else by score."""
    room, left, chosen = cap.unsqueeze(1), keep, torch.zeros_like(keep)  # [R, 1], [R, N]
    competing, places = torch.zeros_like(keep), torch.zeros_like(room)
    for index, tier in enumerate((*tiers, keep)):
        members = left & tier
        left = left & ~tier
        size = members.sum(1, keepdim=True)
        fits = size <= room
        if index in (1, 3):  # newest first
            chosen = chosen | (members & (_from_right(members) <= room))
        else:
            chosen = chosen | (members & fits)
            # At most one tier of a row runs out of room with places left: what comes later finds none.
            partly = ~fits & (room > 0)
            competing = competing | (members & partly)
            places = torch.where(partly, room, places)
        room = (room - size).clamp(min=0)
    return chosen | _top(mass, competing, places.squeeze(1))


def _top(mass: Tensor, candidate: Tensor, wanted: Tensor) -> Tensor:
    """[R, N] the `wanted` [R] candidates of the highest scores, of equal scores the newest; `wanted` may be 0."""
    score = mass.masked_fill(~candidate, -1.0)

    def enough(threshold: Tensor) -> Tensor:
        return (score >= threshold.unsqueeze(1)).sum(1) >= wanted

    # Exponents 0 … 254: the first stands for zero and subnormal numbers, whose steps are those of exponent 1.
    power = torch.tensor([0.0, *(2.0**e for e in range(-126, 128))], device=mass.device)
    exponent = torch.zeros_like(wanted)
    for bit in _EXPONENTS:
        trial = exponent + bit
        reached = (trial < len(power)) & enough(power.index_select(0, trial.clamp(max=len(power) - 1)))
        exponent = torch.where(reached, trial, exponent)
    threshold, step = power.index_select(0, exponent), power.index_select(0, exponent.clamp(min=1))  # [R]
    for bit in range(1, _MANTISSA + 1):
        trial = threshold + step * 2.0**-bit
        threshold = torch.where(enough(trial), trial, threshold)
    above = score > threshold.unsqueeze(1)
    tie = candidate & (score == threshold.unsqueeze(1))
    return above | (tie & (_from_right(tie) <= (wanted - above.sum(1)).unsqueeze(1)))


def _from_right(mask: Tensor) -> Tensor:
    """[R, N] how many are set from here to the right end."""
    count = mask.long()
    return count.sum(1, keepdim=True) - count.cumsum(1) + count


def _share(count: Tensor, ratio: float) -> Tensor:
    """[R, 1] size of a recent window over `count` [R] tokens: floor(ratio · count), at least 1."""
    return (count.double() * ratio).floor().long().clamp(min=1).unsqueeze(1)
