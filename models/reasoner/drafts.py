"""What the families share: token slots, where -1 means "no token here", and their compaction into padded rows.

A family simulates a batch of machines for as long as the longest trace, and lays its tokens out in units (an
iteration of a loop, a step of a walk). `finish` then picks where each row stops, fills in the counters, and appends
the answer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .vocabulary import COUNTER, COUNTERS, EOS, ID, PAD

ABSENT = -1
CYCLE = 6  # least common multiple of the check periods: a counter shifted by it leaves the check lines in place


@dataclass(frozen=True)
class Draft:
    """A batch of n simulated machines before a length is chosen; all tensors int64 unless noted."""

    prompt: Tensor  # [n, P] slots; slots 2 and 3 are the first counter and the limit, filled in later
    preamble: Tensor  # [n, A] slots
    units: Tensor  # [n, U, S] int16 slots; a header unit holds its counter and the limit in slots 0 and 1
    header: Tensor  # bool [n, U]: the machine may stop before this unit
    phase: Tensor  # [n] first counter modulo CYCLE
    closing: Tensor  # [n, U, C] slots of the answer when the machine stops before unit u; the last is the value


def randint(high: int, shape: tuple[int, ...], generator: torch.Generator, low: int = 0) -> Tensor:
    """Uniform integers in low..high-1 on the generator's device."""
    return torch.randint(low, high, shape, generator=generator, device=generator.device)


def used(count: Tensor, width: int) -> Tensor:
    """Which of `width` places the first count [n] are: bool [n, width]."""
    return torch.arange(width, device=count.device) < count[:, None]


def named(first: int, values: Tensor, present: Tensor) -> Tensor:
    """Slots `name value` of the present ones: values [..., w] -> [..., 2w]; names are the ids from `first` on."""
    names = torch.arange(first, first + values.shape[-1], device=values.device).expand_as(values)
    return torch.where(present[..., None], torch.stack([names, values], -1), ABSENT).flatten(-2)


def compact(slots: Tensor) -> tuple[Tensor, Tensor]:
    """Left-aligns the present tokens of [n, S] slots: ids [n, longest] padded with PAD, and lengths [n]."""
    present = slots >= 0
    place = present.cumsum(1, dtype=torch.int32)
    lengths = place[:, -1].long()
    width = int(lengths.max())
    target = torch.where(present, place - 1, width).long()
    ids = torch.full((slots.shape[0], width + 1), PAD, dtype=torch.long, device=slots.device)
    return ids.scatter_(1, target, slots.long())[:, :width], lengths


def finish(draft: Draft, generator: torch.Generator, min_tokens: int, max_tokens: int) -> tuple[Tensor, ...]:
    """Stops each row at the last header that keeps it within a random target length.

    Returns (prompt slots [m, P], trace slots [m, T], answers [m]) of the m ≤ n rows whose length is within
    min_tokens..max_tokens and whose counters suffice.
    """
    n = draft.prompt.shape[0]
    lengths = (draft.units >= 0).sum(2)
    before = lengths.cumsum(1) - lengths + (draft.preamble >= 0).sum(1, keepdim=True)
    total = before + (draft.closing >= 0).sum(2) + 4  # counter, limit, `halt` and the closing, then `<eos>`
    laps = draft.header.cumsum(1) - 1
    target = randint(max_tokens + 1, (n, 1), generator, low=min_tokens)
    fits = draft.header & (total <= target) & (laps > 0) & (laps < COUNTERS - CYCLE)
    stop = torch.where(fits, torch.arange(fits.shape[1], device=fits.device), 0).argmax(1)
    room = (COUNTERS - 1 - laps.gather(1, stop[:, None])[:, 0] - draft.phase) // CYCLE
    jump = (torch.rand(n, generator=generator, device=generator.device) * (room + 1)).long().clamp(max=room)
    first = draft.phase + CYCLE * jump
    keep = fits.any(1) & (total.gather(1, stop[:, None])[:, 0] >= min_tokens)
    prompt, trace, answers = _fill(draft, laps, stop, first)
    return prompt[keep], trace[keep], answers[keep]


def _fill(draft: Draft, laps: Tensor, stop: Tensor, first: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Writes counters and limits, drops the units after `stop` [n], and appends the answer."""
    n, count, _ = draft.units.shape
    rows = torch.arange(n, device=stop.device)
    limit = COUNTER + first + laps[rows, stop]
    prompt = draft.prompt.clone()
    prompt[:, 2], prompt[:, 3] = COUNTER + first, limit
    units = draft.units.clone()
    units[:, :, 0] = torch.where(draft.header, COUNTER + first[:, None] + laps, units[:, :, 0].long()).short()
    units[:, :, 1] = torch.where(draft.header, limit[:, None], units[:, :, 1].long()).short()
    units[torch.arange(count, device=stop.device) >= stop[:, None]] = ABSENT
    closing = draft.closing[rows, stop]
    halt, eos = torch.full_like(limit, ID["halt"]), torch.full_like(limit, EOS)
    tail = torch.cat([limit[:, None], limit[:, None], halt[:, None], closing, eos[:, None]], 1)
    trace = torch.cat([draft.preamble.short(), units.flatten(1), tail.short()], 1)
    return prompt, trace, closing[:, -1]
