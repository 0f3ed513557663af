"""The bundled reasoner's own problems: any of its families, traces of a chosen length."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from lethe_compile.errors import InputError
from lethe_compile.evaluation import Grade, Problem
from lethe_compile.models import reasoner
from lethe_compile.models.reasoner.task import render

FAMILIES = reasoner.FAMILIES
_EXCESS = 32  # tokens beyond the reference trace, after which a row has gone astray
_BUCKETS = 1000  # tokens: traces are broken down by thousands
_SHOWN = 6  # tokens of the output's end, which hold the answer


@dataclass(frozen=True)
class Reasoner:
    """Solved: the trace ends by itself, with the exact answer; see `models/reasoner`. As many of each family as can be.

    Lengths are of the reference trace, in tokens.
    """

    name: str = "reasoner"
    families: tuple[str, ...] = FAMILIES
    min_tokens: int = 1000
    max_tokens: int = 4000

    def __post_init__(self) -> None:
        shortest, longest = self.min_tokens, self.max_tokens
        if not (isinstance(shortest, int) and isinstance(longest, int) and 1 <= shortest < longest):
            raise InputError(f"task {self.name!r}: min_tokens={shortest!r} must be below max_tokens={longest!r}")

    def problems(self, n: int, seed: int, tokenizer: Any) -> list[Problem]:
        """Alternating between families, so that the first few have some of each."""
        share = -(-n // len(self.families))
        drawn = [self._family(family, share, seed) for family in self.families]
        return [drawn[i % len(drawn)][i // len(drawn)] for i in range(n)]

    def _family(self, family: str, n: int, seed: int) -> list[Problem]:
        options = {"seed": seed, "family": family, "min_tokens": self.min_tokens, "max_tokens": self.max_tokens}
        try:
            drawn = reasoner.problems(n, **options)  # type: ignore[arg-type]
        except ValueError as error:
            raise InputError(f"task {self.name!r}: {error}") from error
        return [self._problem(drawn, row) for row in range(n)]

    def _problem(self, drawn: reasoner.Problems, row: int) -> Problem:
        trace = drawn.trace(row)
        low = len(trace) // _BUCKETS * _BUCKETS
        return Problem(
            id=f"{self.name}/{drawn.family}-{row}",
            prompt=tuple(drawn.prompt(row)),
            max_new_tokens=len(trace) + _EXCESS,
            reference=_alone(drawn, row),
            group=f"{drawn.family} {low}-{low + _BUCKETS}",
            expected_tokens=len(trace),
        )

    def grade(self, problem: Problem, tokens: list[int], tokenizer: Any) -> Grade:
        solved = reasoner.solved(problem.reference, torch.tensor([tokens]))
        return Grade(float(solved), render(tokens[-_SHOWN:]))


def _alone(drawn: reasoner.Problems, row: int) -> reasoner.Problems:
    """One problem without the padding of the others, which would travel with it between processes."""
    one = drawn[[row]]
    prompt, trace = one.prompt_ids[:, : int(one.prompt_lengths)], one.trace_ids[:, : int(one.trace_lengths)]
    return replace(one, prompt_ids=prompt.clone(), trace_ids=trace.clone())
