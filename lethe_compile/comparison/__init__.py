"""The check for continuous integration: a pruned graph beside the unpruned one, on the same prompts.

    comparison = lethe.compare(model, ["Prove that …"], tokenizer=tokenizer, thresholds=Thresholds(max_kl=0.02))
    print(comparison)  # tables; `passed`, `failures`, `to_dict()`

`lethe compare` is its command line, `lethe_compile.testing` its form for pytest.
"""

from __future__ import annotations

from lethe_compile.comparison.baseline import write_baseline
from lethe_compile.comparison.cases import Case, read_prompts, task_cases
from lethe_compile.comparison.result import Comparison
from lethe_compile.comparison.run import Progress, compare
from lethe_compile.comparison.thresholds import Thresholds, read_pyproject

__all__ = [
    "Case",
    "Comparison",
    "Progress",
    "Thresholds",
    "compare",
    "read_prompts",
    "read_pyproject",
    "task_cases",
    "write_baseline",
]
