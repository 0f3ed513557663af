"""What the mask of a decode step lets its token see, proved by evaluating it with many numbers of tokens before."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from lethe_compile.passes.cache_ops import Read
from lethe_compile.passes.mask_constants import NotABand
from lethe_compile.passes.program import Mask
from lethe_compile.passes.step import MOST, Steps

_DENSE = 48  # numbers of tokens before the step that are tried one after the other
_PADDING = 3
_DENIED = -1e4  # an additive mask denies with the dtype's lowest value or -inf; fp16's is -65504


@dataclass(frozen=True)
class StepMask:
    """A mask as an operand: additive where it is of a floating dtype; a boolean one may say what it denies."""

    node: fx.Node
    denies: bool = False


def prove(steps: Steps, mask: StepMask | None, key: Read) -> Mask:
    """The band that `mask` is over the tokens which `key` reads, no mask being all of them.

    Rows are checked element by element: for 0 … 47 tokens before, around each constant that the mask is computed with
    and each size of the cache, and for as many tokens as fit.

    Raises:
        NotABand: with the reason.
    """
    rows = {past: _visible(steps, mask, key, past) for past in _pasts(steps, mask, key)}
    found = _band(rows)
    for past, row in rows.items():
        _expect(row, past, found)
    evidence = f"evaluated with {len(rows)} numbers of tokens before the step, up to {max(rows)}"
    if mask is not None and steps.reads(mask.node, "attention_mask"):
        evidence += ", some of them padding"
        for past in [p for p in rows if p < _DENSE][_PADDING::7]:
            _expect(_visible(steps, mask, key, past, padding=_PADDING), past, found, hidden=_PADDING)
    return replace(found, evidence=evidence)


def _pasts(steps: Steps, mask: StepMask | None, key: Read) -> list[int]:
    """Numbers of tokens before the step to try."""
    room = key.cache.room
    last = MOST if room is None else room - 1
    sizes = {key.cache.shape[key.cache.slots], steps.limits.get(key.cache.state, 0)}
    constants = set() if mask is None else steps.constants([mask.node])
    edges = {edge for c in {*sizes, *constants} for edge in (c - 1, c, c + 1, 2 * c + 1)}
    edges |= {*range(_DENSE), *(() if room is None else (last // 2, last))}
    return sorted(edge for edge in edges if 0 <= edge <= last)


def _visible(steps: Steps, mask: StepMask | None, key: Read, past: int, padding: int = 0) -> Tensor:
    """[past + 1] bool: the positions that a token with `past` before it sees."""
    allowed = torch.ones(1, dtype=torch.bool, device=steps.device)
    if mask is not None:
        try:
            (value,) = steps.values([mask.node], past, padding=padding)
        except (RuntimeError, IndexError) as error:
            reason = str(error).strip().splitlines()[0]
            raise NotABand(f"its mask cannot be computed with {past} tokens before: {reason}") from error
        allowed = _row(value, mask)
    if len(allowed) == 1:  # the same for every key
        allowed = allowed.expand(_count(steps, key, past))
    positions = key.positions(steps, past, len(allowed))
    empty = (allowed & (positions < 0)).nonzero()
    if len(empty):
        name = key.cache.state.name
        rolls = ", as the step expects it to be full" if key.cache.kind == "shift" else ""
        slot = int(empty[0])
        raise NotABand(f"with {past} tokens before it, a token sees slot {slot} of '{name}', which holds none{rolls}")
    visible = torch.zeros(past + 1, dtype=torch.bool, device=steps.device)
    visible[positions[allowed]] = True
    return visible


def _count(steps: Steps, key: Read, past: int) -> int:
    """Keys that are read with `past` tokens before."""
    cache = key.cache
    if cache.kind == "grow":
        return steps.held(cache.state, past) + 1
    new = torch.zeros(steps.size(cache.new), dtype=cache.new.meta["val"].dtype, device=steps.device)
    (value,) = steps.values([key.node], past, bound={cache.new: new})
    return int(value.shape[-1 if key.keys_last else -2])


def _row(value: Tensor, mask: StepMask) -> Tensor:
    """[keys] bool of what the mask lets through; it must be the same for every head and row."""
    if value.dtype != torch.bool:
        denied = value <= _DENIED
        if not bool((denied | (value == 0)).all()):
            raise NotABand("its mask is an additive bias, which depends on positions or heads")
        value = ~denied
    elif mask.denies:
        value = ~value
    rows = value.reshape(-1, value.shape[-1])
    if not bool((rows == rows[:1]).all()):
        raise NotABand("its mask differs from head to head")
    return rows[0]


def _band(rows: dict[int, Tensor]) -> Mask:
    """The band that the fewest tokens without a sight of the first one tell; whether it is one is not seen here."""
    blind = min((past for past, row in rows.items() if not bool(row[0])), default=None)
    if blind is None:
        return Mask()
    return Mask(blind, chunked=blind > 1 and int(rows[blind].sum()) == 1)


def _expect(row: Tensor, past: int, mask: Mask, hidden: int = 0) -> None:
    index = torch.arange(past + 1, device=row.device)
    expected = index >= hidden
    if mask.window is not None and mask.chunked:
        expected &= index >= past // mask.window * mask.window
    elif mask.window is not None:
        expected &= index > past - mask.window
    if not torch.equal(row, expected):
        key = int((row != expected).nonzero()[0])
        window = "" if mask.window is None else f" with a window of {mask.window}"
        sees = "sees" if bool(row[key]) else "does not see"
        raise NotABand(
            f"its mask is not {mask.kind}{window}: with {past} tokens before it, a token {sees} that at position {key}"
        )
