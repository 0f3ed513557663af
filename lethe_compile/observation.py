"""A prompt run in two parts, so that only its newest queries leave attention mass; see `Policy.observation_window`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Run = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]
"""(ids [R, T], positions [R, T], lengths [R], last [R] or None) -> logits [R, T | 1, vocab], as `Executor.run`."""


def fill_observed(
    run: Run, clear_mass: Callable[[], None], ids: Tensor, lengths: Tensor, window: int, whole: bool
) -> Tensor:
    """Fill an empty cache from right-padded ids ``[R, T]``, T > 1, of `lengths` ``[R]``, the newest `window` apart.

    At least one token of each row is in the first part: what keeps other state than a KV cache begins with it. Returns
    logits ``[R, T, vocab]``, or unless `whole` those of each row's last token, ``[R, 1, vocab]``.
    """
    width = ids.shape[1]
    tail = (lengths - 1).clamp(0, window)  # [R]
    head = lengths - tail
    columns = torch.arange(width, device=ids.device)
    # A column more than the longest head, padding at the last position: rotary frequencies may follow the greatest.
    first = max(2, width - window + 1)
    positions = columns[:first].repeat(len(ids), 1)
    positions[:, -1] = width - 1
    before = run(ids[:, :first], positions, head, None if whole else (head - 1).clamp(min=0))
    clear_mass()

    behind = head[:, None] + columns[:window]  # [R, W] columns of the second part; beyond the row's length, padding
    inside = behind.clamp(max=width - 1)
    after = run(ids.gather(1, inside), inside, tail, None if whole else (tail - 1).clamp(min=0))
    if not whole:
        return torch.where((tail > 0)[:, None, None], after, before)
    logits = before.new_zeros(len(ids), width + behind.shape[1], before.shape[2])
    logits[:, :first] = before
    logits.scatter_(1, behind[:, :, None].expand_as(after), after)
    return logits[:, :width]
