"""Runs batches of problems on one optimized model, and tells of each row what it wrote and what its cache held."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from math import inf, isnan
from typing import Any, Protocol

import torch
from torch import Tensor

from lethe_compile.config import LetheConfig
from lethe_compile.evaluation.cells import Cell
from lethe_compile.evaluation.journal import Record
from lethe_compile.evaluation.problems import Problem, Task
from lethe_compile.policies import make_policy
from lethe_compile.prompt import left_padded
from lethe_compile.recorder import Recorder
from lethe_compile.runtime import OptimizedModel
from lethe_compile.sampling import token_ids


class OutOfTime(Exception):
    """The time limit came while a batch was generating; nothing of it counts."""


class Engine(Protocol):
    """What a worker runs batches on."""

    def run(self, cell: Cell, problems: Sequence[Problem], deadline: float) -> tuple[list[Record], Record]:
        """A record for each problem, in order, and the timeline of the batch; see `ModelEngine.run`.

        Raises `OutOfTime` once `time.monotonic()` passes `deadline`.
        """


class RowLimits:
    """A stopping criterion: ends each row after its own number of new tokens, and everything at the deadline."""

    def __init__(self, lengths: Tensor, deadline: float) -> None:
        self._lengths, self._deadline = lengths, deadline  # [rows] columns at which a row ends

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        if time.monotonic() > self._deadline:
            raise OutOfTime
        return self._lengths <= input_ids.shape[1]


class ModelEngine:
    """A model and the tasks that grade what it writes.

    Args:
        optimize: makes the `OptimizedModel` of a configuration. It is called at most twice, for policies that choose
            per layer and for those that choose per KV head; between cells of a kind the model is only reconfigured.
        sampling: options of `generate`, such as temperature.
    """

    def __init__(
        self,
        optimize: Callable[[LetheConfig], OptimizedModel],
        tokenizer: Any,
        tasks: Sequence[Task],
        *,
        sampling: dict[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        self.tokenizer, self.seed = tokenizer, seed
        self.fast: OptimizedModel
        self._optimize = optimize
        self._made: dict[bool, OptimizedModel] = {}  # by `Policy.per_head`
        self._tasks = {task.name: task for task in tasks}
        self._sampling = sampling or {"do_sample": False}
        self._cell: Cell | None = None
        self._end: frozenset[int] = frozenset()

    def run(self, cell: Cell, problems: Sequence[Problem], deadline: float) -> tuple[list[Record], Record]:
        """One batch.

        Returns:
            for each problem `score`, `answer`, `new_tokens`, `terminated`, `kv_mean`, `kv_peak` (bytes of retained
            tokens), `pool_mean`, `pool_peak` (of pages held), `seconds` (its share of the batch's by tokens), `batch`;
            and the timeline: `steps` [S], `retained` and `sparsity` [S][L], means over active rows, null where not
            measured.

        Raises:
            OutOfTime: the deadline passed.
        """
        if self._cell is None or (self._cell.config, self._cell.batch) != (cell.config, cell.batch):
            self._switch(cell, problems)
        options = {"seed": self.seed, **self._sampling}
        with self.fast.recorded() as recorder:
            written, seconds = write(self.fast, problems, self._end, deadline, **options)
        total = sum(map(len, written))
        usage = recorder.usage()
        records = []
        for row, (problem, tokens) in enumerate(zip(problems, written, strict=True)):
            grade = self._tasks[problem.id.partition("/")[0]].grade(problem, tokens, self.tokenizer)
            record = {"score": grade.score, "answer": grade.answer, "new_tokens": len(tokens)}
            record |= {"terminated": tokens[-1] in self._end, "batch": len(problems)}
            record |= {"kv_mean": round(float(usage.kv_mean[row])), "kv_peak": int(usage.kv_peak[row])}
            record |= {"pool_mean": round(float(usage.pool_mean[row])), "pool_peak": int(usage.pool_peak[row])}
            records.append(record | {"seconds": round(seconds * len(tokens) / total, 6)})
        return records, _timeline(recorder)

    def _switch(self, cell: Cell, problems: Sequence[Problem]) -> None:
        """Other settings or batches. On a GPU a few untimed steps compile and record what these replay."""
        kind = make_policy(cell.config).per_head
        first = kind not in self._made
        if first:
            self._made[kind] = self._optimize(cell.config)
        elif self._cell is None or self._cell.config != cell.config:
            self._made[kind].reconfigure(cell.config)
        self.fast, self._cell = self._made[kind], cell
        self._end = end_tokens(self.fast, self.tokenizer)
        if first or self.fast.device.type == "cuda":
            warm_up(self.fast, problems)


def warm_up(fast: OptimizedModel, problems: Sequence[Problem]) -> None:
    """Two steps of this batch, which compile and record what its generation replays."""
    ids, mask = (t.to(fast.device) for t in left_padded([problem.prompt for problem in problems]))
    fast.generate(ids, attention_mask=mask, max_new_tokens=2, do_sample=False, pad_token_id=0)


def write(
    fast: OptimizedModel, problems: Sequence[Problem], end: frozenset[int], deadline: float = inf, **options: Any
) -> tuple[list[list[int]], float]:
    """New tokens of each problem, up to and with the first of `end`, from one batch; and the seconds that it took.

    `options` go to `generate`. Raises `OutOfTime` once `time.monotonic()` passes `deadline`.
    """
    ids, mask = left_padded([problem.prompt for problem in problems])
    columns = ids.shape[1]
    limits = torch.tensor([columns + problem.max_new_tokens for problem in problems], device=fast.device)
    start = time.perf_counter()
    out: Tensor = fast.generate(
        ids.to(fast.device),
        attention_mask=mask.to(fast.device),
        max_new_tokens=max(problem.max_new_tokens for problem in problems),
        stopping_criteria=[RowLimits(limits, deadline)],
        eos_token_id=sorted(end) or None,
        pad_token_id=next(iter(sorted(end)), 0),
        **options,
    )
    rows = out[:, columns:].tolist()
    seconds = time.perf_counter() - start
    return [_cut(row, problem, end) for row, problem in zip(rows, problems, strict=True)], seconds


def _cut(row: list[int], problem: Problem, end: frozenset[int]) -> list[int]:
    """The new tokens of a row up to its end, that included."""
    last = next((place for place, token in enumerate(row) if token in end), len(row))
    return row[: min(last + 1, problem.max_new_tokens)]


def end_tokens(fast: OptimizedModel, tokenizer: Any) -> frozenset[int]:
    """Ids that end a sequence, by the model's generation config, else by the tokenizer."""
    for source in (fast.generation_config, tokenizer):
        ids = token_ids(getattr(source, "eos_token_id", None), torch.device("cpu"))
        if ids is not None:
            return frozenset(ids.tolist())
    return frozenset()


def _timeline(recorder: Recorder) -> Record:
    steps, retained, sparsity = recorder.by_layer()
    measured = [[None if isnan(value) else round(value, 4) for value in row] for row in sparsity.tolist()]
    return {"steps": steps, "retained": retained.round(2).tolist(), "sparsity": measured}


MakeEngine = Callable[[], Engine]
"""Makes an engine in a worker process; must be picklable."""
