"""Verifiable reasoning problems with long traces: generated on the device, in bulk, from a seed.

Two families (see `loop_machine` and `rotor_walk`) whose traces have the redundancy of real chains of thought: facts
that stay true and are re-read at varied periods, state that is superseded, and lines that only restate and check.
Every token of a trace follows from the ones before, so that greedy decoding has one right answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import loop_machine, rotor_walk
from .drafts import Draft, compact, finish
from .vocabulary import EOS, PAD, parse, render

__all__ = [
    "EOS", "FAMILIES", "PAD", "Problems", "generate_problems", "parse", "render", "sequences", "solved",
    "token_accuracy",
]  # fmt: skip

_DRAFTS: dict[str, Callable[[int, torch.Generator, int], Draft]] = {
    "loop": loop_machine.draft,
    "walk": rotor_walk.draft,
}
FAMILIES: tuple[str, ...] = tuple(_DRAFTS)
_ROUND = 4096  # candidates simulated at once, which bounds memory
_MAX_ROUNDS = 200


@dataclass(frozen=True)
class Problems:
    """A batch of n problems of one family, left-aligned; all tensors int64."""

    family: str
    prompt_ids: Tensor  # [n, P], starts with <bos>, right-padded
    prompt_lengths: Tensor  # [n]
    trace_ids: Tensor  # [n, L]: the reference trace with the answer and <eos>, right-padded
    trace_lengths: Tensor  # [n]
    answer_ids: Tensor  # [n]: the token before <eos>

    def __len__(self) -> int:
        return self.prompt_ids.shape[0]

    def __getitem__(self, rows: slice | Tensor | Sequence[int]) -> Problems:
        """The problems of the given rows, with the same padding."""
        index = rows if isinstance(rows, slice | Tensor) else torch.tensor(rows, device=self.prompt_ids.device)
        fields = (self.prompt_ids, self.prompt_lengths, self.trace_ids, self.trace_lengths, self.answer_ids)
        return Problems(self.family, *(field[index] for field in fields))

    def prompt(self, row: int) -> list[int]:
        """Ids of one prompt without padding."""
        return self.prompt_ids[row, : int(self.prompt_lengths[row])].tolist()

    def trace(self, row: int) -> list[int]:
        """Ids of one reference trace without padding."""
        return self.trace_ids[row, : int(self.trace_lengths[row])].tolist()


def generate_problems(
    family: str, n: int, *, seed: int, min_tokens: int, max_tokens: int, device: str | torch.device = "cpu"
) -> Problems:
    """n fresh problems whose traces have min_tokens..max_tokens tokens, the same for the same seed and device type.

    Raises ValueError for an unknown family, or where too few machines can stop within the range.
    """
    if family not in _DRAFTS:
        raise ValueError(f"unknown family {family!r}; known: {', '.join(FAMILIES)}")
    generator = torch.Generator(device).manual_seed(seed)
    parts: list[tuple[Tensor, ...]] = []
    found = 0
    for _ in range(_MAX_ROUNDS):
        candidates = min(_ROUND, 8 + (n - found) * 5 // 4)
        parts.append(finish(_DRAFTS[family](candidates, generator, max_tokens), generator, min_tokens, max_tokens))
        found += parts[-1][0].shape[0]
        if found >= n:
            prompt, trace, answers = (torch.cat(tensors)[:n] for tensors in zip(*parts, strict=True))
            return Problems(family, *compact(prompt), *compact(trace), answers)
    raise ValueError(f"only {found} of {n} {family} problems fit in {min_tokens}..{max_tokens} trace tokens")


def _aligned(problems: Problems, generated: Tensor) -> Tensor:
    """`generated` [n, M] cut or padded to the width of the reference traces."""
    width = problems.trace_ids.shape[1]
    missing = max(0, width - generated.shape[1])
    return torch.nn.functional.pad(generated, (0, missing), value=PAD)[:, :width]


def solved(problems: Problems, generated: Tensor) -> Tensor:
    """Which problems the `generated` new tokens [n, M] solve: bool [n].

    A row counts when it terminates by itself (an <eos>), and closes as the reference does: the counter at the
    limit, `halt`, what is asked for, and the exact answer. How it got there is not looked at.
    """
    ended = (generated == EOS).any(1)
    stop = (generated == EOS).int().argmax(1)
    size = 6 if problems.family == "loop" else 5  # counter, limit, halt, (register,) value, eos
    back = torch.arange(size - 1, -1, -1, device=generated.device)
    reference = problems.trace_ids.gather(1, (problems.trace_lengths - 1)[:, None] - back)
    place = stop[:, None] - back
    closing = generated.gather(1, place.clamp(min=0))
    return ended & ((closing == reference) & (place >= 0)).all(1)


def token_accuracy(problems: Problems, generated: Tensor) -> Tensor:
    """Share of the reference trace that `generated` [n, M] reproduces, position by position: float [n]."""
    inside = torch.arange(problems.trace_ids.shape[1], device=generated.device) < problems.trace_lengths[:, None]
    right = (_aligned(problems, generated) == problems.trace_ids) & inside
    return right.sum(1) / problems.trace_lengths


def sequences(problems: Problems, length: int) -> tuple[Tensor, Tensor]:
    """Prompt and trace joined, for teacher forcing: ids [n, length] and bool [n, length], true on trace tokens."""
    n = len(problems)
    ids = torch.full((n, length + 1), PAD, dtype=torch.long, device=problems.prompt_ids.device)
    ids[:, : problems.prompt_ids.shape[1]] = problems.prompt_ids
    place = torch.arange(problems.trace_ids.shape[1], device=ids.device)
    target = torch.where(place < problems.trace_lengths[:, None], problems.prompt_lengths[:, None] + place, length)
    ids.scatter_(1, target.clamp(max=length), problems.trace_ids)
    position = torch.arange(length, device=ids.device)
    begin, total = problems.prompt_lengths[:, None], (problems.prompt_lengths + problems.trace_lengths)[:, None]
    return ids[:, :length], (position >= begin) & (position < total)
