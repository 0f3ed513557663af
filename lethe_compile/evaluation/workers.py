"""Hands batches to workers: this process itself, or spawned ones that each make an engine of their own.

The parent deals one batch at a time to each worker over a pipe and is the only one that writes results, so that a
worker may fail or be killed at any moment: its batch is known, reported, and left for the next run.
"""

from __future__ import annotations

import multiprocessing as mp
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from lethe_compile.errors import LetheError
from lethe_compile.evaluation.cells import Cell
from lethe_compile.evaluation.engine import Engine, MakeEngine, OutOfTime
from lethe_compile.evaluation.journal import Record
from lethe_compile.evaluation.problems import Problem


@dataclass(frozen=True)
class Job:
    """One batch of one cell."""

    cell: Cell
    problems: tuple[Problem, ...]


@dataclass(frozen=True)
class Done:
    job: Job
    records: list[Record]
    timeline: Record


@dataclass(frozen=True)
class Failed:
    """`job` is None where no engine could be made, or nothing was running."""

    job: Job | None
    error: str  # its kind and message
    details: str  # a traceback, where there is one

    def __str__(self) -> str:
        if self.job is None:
            return f"a worker could not start: {self.error}"
        first, *rest = [problem.id for problem in self.job.problems]
        others = f" and {len(rest)} more of its batch" if rest else ""
        return f"{self.job.cell.id}, {first}{others}: {self.error}"


Event = Done | Failed
_GRACE = 10.0  # seconds after the deadline for a worker to notice it, which takes one step


def run_jobs(jobs: Sequence[Job], make: MakeEngine, processes: int, threads: int, deadline: float) -> Iterator[Event]:
    """Run all `jobs`, in the order in which they finish; those not done by the `deadline` are left out.

    With one process everything runs in this one. Each has `threads` threads of torch.
    """
    if processes == 1:
        yield from _inline(jobs, make, threads, deadline)
    else:
        yield from _spawned(jobs, make, min(processes, len(jobs)), threads, deadline)


def _inline(jobs: Sequence[Job], make: MakeEngine, threads: int, deadline: float) -> Iterator[Event]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        engine = make()
        for job in jobs:
            if time.monotonic() > deadline:
                return
            event = _attempt(engine, job, deadline)
            if event is None:
                return
            yield event
    finally:
        torch.set_num_threads(before)


def _attempt(engine: Engine, job: Job, deadline: float) -> Event | None:
    """The job's outcome; None when time ran out."""
    try:
        return Done(job, *engine.run(job.cell, job.problems, deadline))
    except OutOfTime:
        return None
    except Exception as error:  # the other cells may still work; this one is reported with what failed
        return Failed(job, _first_line(error), traceback.format_exc())


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


# ------------------------------------------------------------------------------------------------------------ spawned


@dataclass
class _Worker:
    process: Any  # a multiprocessing process of the spawn context
    pipe: Connection
    job: Job | None = None
    ready: bool = False
    cell: Cell | None = None  # the last one it ran: it need not switch to go on with that

    def read(self) -> Event | None:
        """What it has to say: None once it is ready, and when time ran out."""
        try:
            event: Event | None = self.pipe.recv()
        except EOFError:
            self.process.join()
            code = self.process.exitcode
            how = f"killed by signal {-code}" if code and code < 0 else f"exit status {code}"
            event = Failed(self.job, f"its worker process ended ({how})", "")
        self.ready = True
        return event


def _spawned(jobs: Sequence[Job], make: MakeEngine, processes: int, threads: int, deadline: float) -> Iterator[Event]:
    left = list(jobs)
    context = mp.get_context("spawn")
    with ExitStack() as stack:
        workers = [_start(context, stack, make, threads, deadline) for _ in range(processes)]
        alive = {worker.pipe: worker for worker in workers}
        idle: set[Connection] = set()
        while alive and (left or len(idle) < len(alive)):
            for pipe in list(idle):
                if not left or time.monotonic() > deadline:
                    break
                worker = alive[pipe]
                worker.job = _next_job(left, worker, alive.values())
                worker.cell = worker.job.cell
                pipe.send(worker.job)
                idle.discard(pipe)
            if len(idle) == len(alive):  # the deadline has passed
                return
            patience = max(0.0, deadline + _GRACE - time.monotonic())
            heard = wait([pipe for pipe in alive if pipe not in idle], None if patience == float("inf") else patience)
            if not heard:  # still making an engine, or compiling: what it would do is too late
                return
            for ready in heard:
                worker = alive[ready]  # type: ignore[index]
                event = worker.read()
                ended = not worker.process.is_alive() or (isinstance(event, Failed) and worker.job is None)
                if event is not None:
                    yield event
                worker.job = None
                if ended:
                    del alive[worker.pipe]
                else:
                    idle.add(worker.pipe)


def _next_job(left: list[Job], worker: _Worker, others: Any) -> Job:
    """Rather one of the worker's own cell, else of a cell that nobody runs, else the next: switching costs time."""
    taken = [other.cell for other in others if other.job is not None]
    own = next((i for i, job in enumerate(left) if job.cell == worker.cell), None)
    free = next((i for i, job in enumerate(left) if job.cell not in taken), 0)
    return left.pop(free if own is None else own)


def _start(context: Any, stack: ExitStack, make: MakeEngine, threads: int, deadline: float) -> _Worker:
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, make, threads, deadline), daemon=True)
    process.start()
    theirs.close()
    stack.callback(_stop, process, ours)
    return _Worker(process, ours)


def _stop(process: Any, pipe: Connection) -> None:
    pipe.close()
    process.terminate()
    process.join(10)
    if process.is_alive():
        process.kill()
        process.join()


def _work(pipe: Connection, make: MakeEngine, threads: int, deadline: float) -> None:
    """A worker process: an engine, then one job at a time until the parent hangs up."""
    torch.set_num_threads(threads)
    with suppress(EOFError, KeyboardInterrupt, BrokenPipeError):
        try:
            engine = make()
        except Exception as error:
            details = "" if isinstance(error, LetheError) else traceback.format_exc()
            pipe.send(Failed(None, _first_line(error), details))
            return
        pipe.send(None)
        while True:
            pipe.send(_attempt(engine, pipe.recv(), deadline))
