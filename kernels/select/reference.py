"""Selection of the tokens that stay, in plain PyTorch: batched, on any device, without a host sync.

Source: Zeng et al., *Lethe*, AAAI 2026, arXiv 2511.06029 (breakpoint over sorted attention scores, sinks and a recent
window kept, Hoyer sparsity per layer). Throughout, R rows, N >= 1 slots, and slot j of a row holds a token iff
`j < length` and `position >= 0`: a caller drops tokens beforehand by setting their position to -1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


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
    """Choose each row's tokens by its own scores.

    Candidates are the n tokens that are not sinks (all tokens with `include_sinks`), v their scores in descending
    order, k_i = ceil(i·n / segments) for 0 < i < segments. The breakpoint is the first k_i < n with
    `v[0] > sparse_ratio · v[k_i]`; the tokens before it are salient. Kept: salient, sinks, the newest
    `max(1, floor(recent_ratio · tokens))`, protected. Without a breakpoint every token is kept.

    Where more than `cap` tokens would be kept, exactly `cap` are, taken in this order:

    1. sinks;
    2. the newest `max(1, floor(recent_ratio · cap))` tokens, so that a long prompt cannot starve the recent window;
    3. protected tokens, highest score first;
    4. the rest of the recent window, newest first;
    5. the other kept tokens, highest score first.

    Equal scores rank the newer slot first, so the result is deterministic.

    Args:
        mass: [R, N] float, non-negative and finite scores.
        position: [R, N] int, logical positions, ascending within a row; -1 where a slot holds no token.
        length: [R] int, slots in use.
        sink_tokens: positions below are sinks.
        protected_length: [R] int, positions below are protected; 0 for none.
        cap: [R] int64, each >= 1, most tokens to keep; None for no cap.
        include_sinks: let sinks compete for v[0] and for salience (they stay in any case).

    Returns:
        keep [R, N] bool, False where there is no token; broke [R] bool, whether a breakpoint was found.
    """
    valid = held(position, length)
    sink = valid & (position < sink_tokens)
    protected = valid & (position < protected_length.unsqueeze(1))
    return choose(mass, valid, sink, protected, sparse_ratio, segments, recent_ratio, cap, include_sinks)


def select_shared(
    mass: Tensor,
    position: Tensor,
    length: Tensor,
    active: Tensor,
    *,
    sparse_ratio: float,
    segments: int,
    sink_tokens: int,
    recent_ratio: float,
    protected_length: Tensor,
    cap: Tensor | None = None,
    include_sinks: bool = True,
    choice: Callable[..., tuple[Tensor, Tensor]] | None = None,
) -> tuple[Tensor, Tensor]:
    """One keep-set for the whole batch, as in the paper, from scores summed over its active rows.

    Rows are right-aligned: column N-1 is every row's newest token. A column is a sink, or protected, where it is in any
    active row. The rule of `select` then chooses columns, and each active row keeps its tokens in those.

    Args:
        active: [R] bool; other rows add nothing and keep all their tokens.
        cap: [1] int64 or None, most columns to keep.
        choice: how columns are chosen, `choose` or its equal.
        (others as in `select`)

    Returns:
        keep [R, N] bool; broke [R] bool, the same for all active rows and False elsewhere.
    """
    valid = held(position, length)
    counted = valid & active.unsqueeze(1)
    sink = counted & (position < sink_tokens)
    protected = counted & (position < protected_length.unsqueeze(1))
    token, sink, protected = (_align_right(mask, length).any(0, keepdim=True) for mask in (counted, sink, protected))
    total = summed_mass(mass, position, length, active)
    columns, broke = (choice or choose)(
        total, token, sink, protected, sparse_ratio, segments, recent_ratio, cap, include_sinks
    )  # [1, N], [1]

    slots = torch.arange(mass.shape[1], device=mass.device)
    to_column = (slots + mass.shape[1] - length.unsqueeze(1)).clamp(max=mass.shape[1] - 1)  # [R, N]
    keep = valid & (columns.expand_as(valid).gather(1, to_column) | ~active.unsqueeze(1))
    return keep, broke & active


def top(
    score: Tensor,
    position: Tensor,
    length: Tensor,
    *,
    cap: Tensor,
    recent: Tensor,
    sink_tokens: int,
    protected_length: Tensor,
) -> Tensor:
    """The best `cap` tokens of each row, all of them where there are no more: keep [R, N] bool.

    Taken in this order: sinks; the `recent` newest tokens, newest first; protected tokens, highest score first; the
    others, highest score first. Equal scores rank the newer slot first. On a GPU, too, this sorts: it is for rounds
    that every row takes part in, and waits for nothing.

    Args:
        score: [R, N] float32, finite, of any sign.
        cap: [R] int64, each >= 1.
        recent: [R] int64, each >= 0; at least one token counts as recent.
        (others as in `select`)
    """
    valid = held(position, length)
    age = valid.flip(1).cumsum(1).flip(1)  # [R, N] 1 = newest token
    newest = valid & (age <= recent.clamp(min=1).unsqueeze(1))
    tier = torch.full_like(age, 3)
    for value, members in (
        (2, position < protected_length.unsqueeze(1)),
        (1, newest),
        (0, position < sink_tokens),
    ):
        tier = tier.masked_fill(members, value)
    return _first(tier, torch.where(tier == 1, -age.to(score.dtype), score), valid, cap)


def summed_mass(mass: Tensor, position: Tensor, length: Tensor, active: Tensor) -> Tensor:
    """Scores [R, N] of the active rows, right-aligned and summed over rows: [1, N], 0 where no row has a token."""
    counted = held(position, length) & active.unsqueeze(1)
    return _align_right(mass.masked_fill(~counted, 0), length).sum(0, keepdim=True)


def hoyer_sparsity(mass: Tensor, length: Tensor) -> Tensor:
    """Hoyer sparsity (√n - ‖a‖₁/‖a‖₂) / (√n - 1) of each row: 0 when all n scores are equal, 1 when one is not zero.

    Rows with n <= 1 or no mass at all count as flat, 0: nothing there says that a token is dispensable.

    Args:
        mass: [R, N] float, non-negative, 0 in slots without a token.
        length: [R] int, the row's number of tokens n.

    Returns:
        [R] float32 in [0, 1].
    """
    scores = mass.double()
    l1, l2 = scores.sum(1), scores.square().sum(1).sqrt()
    root = length.double().sqrt()
    sparsity = (root - l1 / l2) / (root - 1)
    return torch.where((length > 1) & (l2 > 0), sparsity.clamp(0, 1), 0).float()


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
    """`select` over masks [R, N] of the tokens, the sinks and the protected among them; arguments as there."""
    candidate = valid if include_sinks else valid & ~sink
    order = _order(~candidate, mass)  # candidates first
    cut, broke = _breakpoint(mass.gather(1, order), candidate.sum(1), sparse_ratio, segments)
    salient = candidate & (_rank(order) < cut.unsqueeze(1))

    age = valid.flip(1).cumsum(1).flip(1)  # [R, N] 1 = newest token
    recent = valid & (age <= _share(valid.sum(1), recent_ratio))
    keep = torch.where(broke.unsqueeze(1), salient | sink | recent | protected, valid)
    if cap is None:
        return keep, broke

    reserve = valid & (age <= _share(cap, recent_ratio))
    tier = torch.full_like(age, 4)
    for value, members in ((3, recent), (2, protected), (1, reserve), (0, sink)):
        tier = tier.masked_fill(members, value)
    newest_first = (tier == 1) | (tier == 3)
    by_score = torch.where(newest_first, -age.to(mass.dtype), mass)
    return _first(tier, by_score, keep, cap), broke


def _breakpoint(scores: Tensor, count: Tensor, sparse_ratio: float, segments: int) -> tuple[Tensor, Tensor]:
    """First segment boundary at which descending `scores` [R, N], `count` [R] of them, fell `sparse_ratio` times.

    Returns the boundary [R] (`count` where there is none) and whether there is one [R].
    """
    step = torch.arange(1, segments, device=scores.device)
    boundary = (step * count.unsqueeze(1) + segments - 1) // segments  # [R, segments - 1], k_i
    inside = boundary < count.unsqueeze(1)
    at = scores.gather(1, boundary.clamp(max=scores.shape[1] - 1)).double()  # exact product with the ratio
    falls = inside & (scores[:, :1].double() > sparse_ratio * at)
    broke = falls.any(1)
    first = boundary.gather(1, falls.int().argmax(1, keepdim=True)).squeeze(1)
    return torch.where(broke, first, count), broke


def _order(tier: Tensor, score: Tensor) -> Tensor:
    """Slots [R, N] sorted by ascending tier, then descending score, then the newer slot first."""
    newest_first = score.flip(1).argsort(dim=1, descending=True, stable=True)
    order = score.shape[1] - 1 - newest_first
    return order.gather(1, tier.gather(1, order).argsort(dim=1, stable=True))


def _first(tier: Tensor, score: Tensor, among: Tensor, cap: Tensor) -> Tensor:
    """[R, N] bool: the first `cap` [R] slots in `_order`, of those that are `among` [R, N]; tiers are below 9."""
    rank = _rank(_order(tier.masked_fill(~among, 9), score))
    return among & (rank < cap.unsqueeze(1))


def _rank(order: Tensor) -> Tensor:
    """Inverse of the permutation `order` [R, N]: each slot's place in it."""
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)


def _share(count: Tensor, ratio: float) -> Tensor:
    """[R, 1] size of a recent window over `count` [R] tokens: floor(ratio · count), at least 1."""
    return (count.double() * ratio).floor().long().clamp(min=1).unsqueeze(1)


def held(position: Tensor, length: Tensor) -> Tensor:
    """[R, N] bool: slots that hold a token."""
    slots = torch.arange(position.shape[1], device=position.device)
    return (slots < length.unsqueeze(1)) & (position >= 0)


def _align_right(values: Tensor, length: Tensor) -> Tensor:
    """Shift each row of `values` [R, N] right until its last used slot is column N-1, filling with zeros."""
    columns = torch.arange(values.shape[1], device=values.device)
    source = columns - (values.shape[1] - length.unsqueeze(1))
    return values.gather(1, source.clamp(min=0)) * (source >= 0)
