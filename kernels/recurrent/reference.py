"""Stateful modules over ragged rows: each row computes what it would compute alone, and keeps its own state."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lethe_compile.kernels.recurrent.call import Layout, StatefulCall


def recurrent(
    operands: Sequence[Tensor],
    states: Sequence[Tensor],
    has_previous_state: Tensor,
    new_lengths: Tensor,
    call: StatefulCall,
) -> Tensor:
    """Run a stateful module over new tokens and update the rows' states in place.

    Args:
        operands: what the module reads, rows and tokens where `call.layouts` says; tokens are padded on the right.
        states: ``[rows, …]`` each, of `call.places`.
        has_previous_state: bool ``[]`` on the host. False: the rows that take part begin, whatever their state holds.
            True: they go on from it, a single token for all rows at once, several one after the other.
        new_lengths: int32 ``[rows]``, tokens of each row; 0 leaves the row's state as it is.

    Returns:
        ``[rows, tokens, call.width]``; what stands behind a row's tokens means nothing.
    """
    _, tokens = call.sizes(operands)
    if not has_previous_state:
        return _begin(operands, states, new_lengths, call)
    if tokens == 1:
        return _advance(operands, states, new_lengths > 0, call)
    steps = []
    for token in range(tokens):
        columns = torch.tensor([token], device=new_lengths.device)
        one = [_select(x, at.tokens, columns) for x, at in zip(operands, call.layouts, strict=True)]
        steps.append(_advance(one, states, new_lengths > token, call))
    return torch.cat(steps, dim=1)


def _begin(operands: Sequence[Tensor], states: Sequence[Tensor], new_lengths: Tensor, call: StatefulCall) -> Tensor:
    """Rows of equal length together, without padding: no module can then mistake padding for tokens."""
    rows, tokens = call.sizes(operands)
    lengths = new_lengths.tolist()
    if lengths == [tokens] * rows:
        packed, new = call.prefill(operands)
        for state, value in zip(states, new, strict=True):
            state.copy_(value)
        return packed
    out = new_lengths.new_zeros(rows, tokens, call.width, dtype=call.dtype)
    for length in sorted({*lengths} - {0}):
        index = torch.tensor([row for row, own in enumerate(lengths) if own == length], device=new_lengths.device)
        part = [_cut(x, at, index, length) for x, at in zip(operands, call.layouts, strict=True)]
        packed, new = call.prefill(part)
        out[index, :length] = packed
        for state, value in zip(states, new, strict=True):
            state.index_copy_(0, index, value)
    return out


def _cut(x: Tensor, at: Layout, rows: Tensor, length: int) -> Tensor:
    x = _select(x, at.batch, rows)
    return x if at.tokens is None else x.narrow(at.tokens, 0, length)


def _select(x: Tensor, dim: int | None, index: Tensor) -> Tensor:
    return x if dim is None else x.index_select(dim, index)


def _advance(operands: Sequence[Tensor], states: Sequence[Tensor], active: Tensor, call: StatefulCall) -> Tensor:
    """One token for every row, active or not; the others' states are put back. The device is not waited for."""
    packed, new = call.advance(operands, [state.clone() for state in states])
    for state, value in zip(states, new, strict=True):
        mask = active.view(-1, *[1] * (state.dim() - 1))
        state.copy_(torch.where(mask, value, state))
    return packed
