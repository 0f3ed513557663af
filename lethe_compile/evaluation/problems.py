"""What a task is: problems as token ids, and how an answer to one is graded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable


@dataclass(frozen=True)
class Problem:
    """One prompt and what counts as its answer. Ids are unique within an evaluation: a task puts its name in front."""

    id: str
    prompt: tuple[int, ...]
    max_new_tokens: int
    reference: Any  # what `Task.grade` compares with; picklable
    group: str  # of the breakdown, such as a family or a level
    expected_tokens: int = 0  # new tokens that a right answer takes, 0 if unknown: alike problems share a batch


@dataclass(frozen=True)
class Grade:
    """`score` in [0, 1], 1 for solved; `answer` is what was read out of the output, for whoever looks into it."""

    score: float
    answer: str


class Grader(Protocol):
    """Says how good an answer is."""

    def grade(self, problem: Problem, tokens: list[int], tokenizer: Any) -> Grade:
        """Grades new `tokens`, the end-of-sequence id included where there was one."""


@runtime_checkable
class Task(Grader, Protocol):
    """A source of problems. Must be picklable: worker processes grade."""

    name: str

    def problems(self, n: int, seed: int, tokenizer: Any) -> list[Problem]:
        """The first n problems, the same for the same seed.

        Raises `InputError` where there are fewer, or where the tokenizer cannot serve.
        """
