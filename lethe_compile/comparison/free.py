"""Free running: both write on by themselves from the same prompts; texts, answers, bytes and speed side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Protocol

from lethe_compile.artifact.loop import Runner
from lethe_compile.artifact.loop import generate as generate_artifact
from lethe_compile.comparison.cases import Case
from lethe_compile.comparison.result import Side
from lethe_compile.comparison.sides import Metered, unpruned
from lethe_compile.evaluation.engine import warm_up, write
from lethe_compile.runtime import OptimizedModel


class Writer(Protocol):
    """One of the two: continues a batch of prompts greedily."""

    def __call__(self, cases: Sequence[Case]) -> tuple[list[Side], float]:
        """What each row wrote, graded, and the seconds that the batch took."""


@dataclass(frozen=True)
class Written:
    """What both wrote in one batch, and the seconds of each: medians over repeats."""

    unpruned: list[Side]
    pruned: list[Side]
    seconds: tuple[float, float]


def run_batch(
    writers: tuple[Writer, Writer], cases: Sequence[Case], repeats: int, first: int, advance: Callable[[], object]
) -> Written:
    """One batch by both in turn, so often; `first` says who begins, and alternates from repeat to repeat.

    Both are deterministic: what is repeated is the time.
    """
    sides: list[list[Side]] = [[], []]
    seconds: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats):
        for place in range(2):
            which = (first + repeat + place) % 2
            sides[which], took = writers[which](cases)
            seconds[which].append(took)
            advance()
    return Written(sides[0], sides[1], (median(seconds[0]), median(seconds[1])))


@dataclass
class GraphWriter:
    """The graph of `optimize`, pruned as it is configured, or not at all."""

    fast: OptimizedModel
    tokenizer: Any
    end: frozenset[int]
    pruned: bool
    warm: bool = False

    def __call__(self, cases: Sequence[Case]) -> tuple[list[Side], float]:
        if self.pruned:
            return self._write(cases)
        with unpruned(self.fast):
            return self._write(cases)

    def _write(self, cases: Sequence[Case]) -> tuple[list[Side], float]:
        problems = [case.problem for case in cases]
        if not self.warm or self.fast.device.type == "cuda":  # there, another configuration is recorded anew
            warm_up(self.fast, problems)
            self.warm = True
        with self.fast.recorded(sparsity=False) as recorder:
            texts, seconds = write(self.fast, problems, self.end, do_sample=False)
        usage = recorder.usage()
        sides = [
            make_side(case, tokens, self.end, float(mean), int(peak), self.tokenizer)
            for case, tokens, mean, peak in zip(cases, texts, usage.kv_mean, usage.kv_peak, strict=False)
        ]
        return sides, seconds


@dataclass
class ArtifactWriter:
    """An exported artifact, by its own loop."""

    runner: Runner
    tokenizer: Any
    end: frozenset[int]
    warm: bool = False

    def __call__(self, cases: Sequence[Case]) -> tuple[list[Side], float]:
        prompts = [case.problem.prompt for case in cases]
        limits = [case.problem.max_new_tokens for case in cases]
        if not self.warm:
            generate_artifact(self.runner, prompts, max_new_tokens=2, eos_token_id=())
            self.warm = True
        metered = Metered(self.runner)
        start = time.perf_counter()
        out = generate_artifact(metered, prompts, max_new_tokens=limits, eos_token_id=sorted(self.end))
        seconds = time.perf_counter() - start
        rows = zip(cases, out.new_ids, metered.mean.tolist(), metered.peak.tolist(), strict=True)
        return [make_side(case, row, self.end, mean, peak, self.tokenizer) for case, row, mean, peak in rows], seconds


def make_side(case: Case, tokens: list[int], end: frozenset[int], kv_mean: float, kv_peak: int, tokenizer: Any) -> Side:
    """One row, graded if anything grades it."""
    grade = None if case.grader is None else case.grader.grade(case.problem, tokens, tokenizer)
    score, answer = (None, "") if grade is None else (grade.score, grade.answer)
    return Side(tuple(tokens), bool(tokens) and tokens[-1] in end, kv_mean, kv_peak, score, answer)
