"""`evaluate`: cells × problems into results that outlive the process, and what they come to."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lethe_compile.errors import InputError
from lethe_compile.evaluation.cells import Cell
from lethe_compile.evaluation.engine import MakeEngine
from lethe_compile.evaluation.figures import Figures, summarize
from lethe_compile.evaluation.journal import Journal, Record
from lethe_compile.evaluation.problems import Problem
from lethe_compile.evaluation.workers import Done, Failed, Job, run_jobs


@dataclass(frozen=True)
class Progress:
    """Told once before work begins, and after every batch: results that are there and that are wanted, in all cells.

    `failed` is what failed just now, `cell` the cell it is about, if any.
    """

    done: int
    wanted: int
    failed: Failed | None
    cell: str


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` returns. `complete`: every problem of every cell has a result."""

    figures: Figures
    timelines: dict[str, Record]  # by cell id, of the first batch, which has the longest problems
    failures: tuple[Failed, ...]
    complete: bool
    seconds: float


def evaluate(
    make: MakeEngine,
    cells: Sequence[Cell],
    problems: Sequence[Problem],
    folder: Path,
    facts: Mapping[str, Any],
    *,
    processes: int = 1,
    threads: int | None = None,
    time_limit: float | None = None,
    seed: int = 0,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Evaluation:
    """Run what `folder` does not hold yet, and compare the policies.

    Args:
        make: makes the engine that problems run on, once in each process; picklable where there are several.
        cells, problems: every cell gets every problem, but where it asks for fewer.
        folder: gets `run.json`, `results.jsonl` and `timelines.jsonl`; a run that was interrupted goes on there.
        facts: of model and problems, JSON-ready: results under other facts are not mixed with these.
        processes: workers side by side; threads: of torch in each, by default an equal share of the machine's.
        time_limit: seconds after which batches under way are given up and `complete` is False.
        seed: of the bootstrap.
        progress: hears of every batch.

    Raises:
        InputError: no cells or problems, problems of the same id, or a folder that holds another run.
        LetheError: with one process, what the engine raises when it is made.
    """
    _check(cells, problems, processes)
    start = time.monotonic()
    deadline = float("inf") if time_limit is None else start + time_limit
    settings = {cell.id: {**cell.config.to_dict(), "batch": cell.batch} for cell in cells}
    distinct = list({cell.id: cell for cell in reversed(cells)}.values())[::-1]
    with Journal(folder, facts, settings) as journal:
        jobs = plan(distinct, problems, journal.records)
        wanted = sum(len(_of(cell, problems)) for cell in distinct)
        failures = []
        if jobs:
            progress(Progress(len(_wanted(distinct, problems, journal.records)), wanted, None, ""))
        threads = threads or max(1, torch.get_num_threads() // processes)
        for event in run_jobs(jobs, make, processes, threads, deadline) if jobs else ():
            failed = event if isinstance(event, Failed) else None
            if isinstance(event, Done):
                _keep(journal, event)
            if failed is not None:
                failures.append(failed)
            where = event.job.cell.id if event.job else ""
            progress(Progress(len(_wanted(distinct, problems, journal.records)), wanted, failed, where))
        records = _wanted(distinct, problems, journal.records)
        timelines = {timeline["cell"]: timeline for timeline in reversed(journal.timelines)}
    figures = summarize(cells, records, seed=seed)
    return Evaluation(figures, timelines, tuple(failures), len(records) == wanted, time.monotonic() - start)


def _check(cells: Sequence[Cell], problems: Sequence[Problem], processes: int) -> None:
    if not cells or not problems:
        raise InputError("nothing to evaluate: there must be a policy and a problem")
    if len({problem.id for problem in problems}) < len(problems):
        raise InputError(
            "two problems have the same id, so that results could not be told apart: is a task there twice?"
        )
    if processes < 1:
        raise InputError(f"{processes} processes: at least 1")


def _of(cell: Cell, problems: Sequence[Problem]) -> Sequence[Problem]:
    return problems if cell.problems is None else problems[: cell.problems]


def plan(cells: Sequence[Cell], problems: Sequence[Problem], known: Mapping[tuple[str, str], Record]) -> list[Job]:
    """The batches that are left, cell by cell, long ones first.

    Problems of like length share a batch, since it takes as long as its longest row. Batches are the same however
    often a run was interrupted, and one that lacks a result is run whole.
    """
    jobs = []
    for cell in cells:
        ordered = sorted(_of(cell, problems), key=lambda p: -(p.expected_tokens or p.max_new_tokens))
        for first in range(0, len(ordered), cell.batch):
            batch = tuple(ordered[first : first + cell.batch])
            if any((cell.id, problem.id) not in known for problem in batch):
                jobs.append(Job(cell, batch))
    return jobs


def _wanted(
    cells: Sequence[Cell], problems: Sequence[Problem], known: Mapping[tuple[str, str], Record]
) -> list[Record]:
    keys = [(cell.id, problem.id) for cell in cells for problem in _of(cell, problems)]
    return [known[key] for key in keys if key in known]


def _keep(journal: Journal, done: Done) -> None:
    names = [{"cell": done.job.cell.id, "problem": p.id, "group": p.group} for p in done.job.problems]
    records = ({**name, **record} for name, record in zip(names, done.records, strict=True))
    journal.add(records, {"cell": done.job.cell.id, "rows": len(names), **done.timeline})
