"""An engine without a model, for tests of everything around it: outcomes follow from cell and problem."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass

from lethe_compile.evaluation import Cell, OutOfTime, Problem
from lethe_compile.evaluation.journal import Record

PROBLEMS = [Problem(f"stub/{n}", (1, 2, 3), 10 + n, None, "even" if n % 2 == 0 else "odd", n + 1) for n in range(12)]


@dataclass
class Stub:
    seconds: float = 0.0
    broken: str = ""  # the problem whose batch raises
    deadly: str = ""  # the problem whose batch ends the process

    def run(self, cell: Cell, problems: Sequence[Problem], deadline: float) -> tuple[list[Record], Record]:
        names = [problem.id for problem in problems]
        if self.broken in names:
            raise ValueError("no such token\nand a long story")
        if self.deadly in names:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.seconds)
        if time.monotonic() > deadline:
            raise OutOfTime
        return [self._record(cell, problem) for problem in problems], {
            "steps": [1],
            "retained": [[1.0]],
            "sparsity": [[None]],
        }

    def _record(self, cell: Cell, problem: Problem) -> Record:
        bytes_held = 1000 if cell.is_full else (cell.config.max_tokens or 500)
        score = 1.0 if cell.is_full else float(random.Random(problem.id).random() * 400 < bytes_held)
        facts = {"score": score, "answer": "", "new_tokens": 10, "terminated": True, "batch": 1, "seconds": 0.5}
        return {**facts, "kv_mean": bytes_held, "kv_peak": bytes_held, "pool_mean": bytes_held, "pool_peak": bytes_held}


@dataclass(frozen=True)
class Make:
    """Picklable: what a spawned worker calls."""

    seconds: float = 0.0
    broken: str = ""
    deadly: str = ""
    unmade: bool = False

    def __call__(self) -> Stub:
        if self.unmade:
            raise RuntimeError("no weights")
        return Stub(self.seconds, self.broken, self.deadly)
