"""Policies side by side on one model: accuracy with intervals, bytes, and speed, in a run that can be interrupted.

    cells = make_cells(["full", "lethe", "lethe:score=sum"], budgets=[128, 256], batches=[16])
    done = evaluate(make_engine, cells, problems, Path("out"), facts={"model": "mine"})
    print(done.figures.cells[0].score)

`make_engine` is any function that returns a `ModelEngine`; `lethe_compile.tools.evaluate` has the command line.
"""

from __future__ import annotations

from lethe_compile.evaluation.cells import Cell, make_cells
from lethe_compile.evaluation.engine import Engine, ModelEngine, OutOfTime
from lethe_compile.evaluation.figures import AtEqualBytes, CellFigures, Estimate, Figures, summarize
from lethe_compile.evaluation.problems import Grade, Problem, Task
from lethe_compile.evaluation.run import Evaluation, Progress, evaluate

__all__ = [
    "AtEqualBytes",
    "Cell",
    "CellFigures",
    "Engine",
    "Estimate",
    "Evaluation",
    "Figures",
    "Grade",
    "ModelEngine",
    "OutOfTime",
    "Problem",
    "Progress",
    "Task",
    "evaluate",
    "make_cells",
    "summarize",
]
