"""For test suites of models: `assert_close_to_unpruned`, and what the pytest fixture `lethe_compare` calls.

def test_pruning_keeps_answers(model, tokenizer, lethe_compare):
    comparison = lethe_compare(model, "prompts.jsonl", tokenizer=tokenizer)
    assert comparison["kl"] < 0.02

def test_pruning_is_close(model, tokenizer):
    assert_close_to_unpruned(model, ["Prove that …"], tokenizer=tokenizer, max_kl=0.02, min_top1=0.98)
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lethe_compile.errors import ConfigError

if TYPE_CHECKING:
    from lethe_compile.comparison import Comparison

_WIDTH = 100  # columns of a failure's table


def assert_close_to_unpruned(
    model: Any, prompts: str | Path | Iterable[Any], *, pyproject: str | Path | None = None, **options: Any
) -> Comparison:
    """Fail where pruning changes a model by more than the limits, with a table of each: limit, measured, worst prompt.

    Args:
        model: what `lethe_compile.optimize` takes or returned.
        prompts: prompts as `lethe_compile.compare` takes them, or a prompts file.
        pyproject: folder whose pyproject.toml may hold limits; the working directory by default.
        options: limits, as fields of `Thresholds`, over those of pyproject.toml; and options of `compare`.

    Returns:
        The comparison, for further assertions.

    Raises:
        AssertionError: a limit does not hold, something regressed from the baseline, or the graph holds an op that it
            should not.
        ConfigError: there is no limit at all, here or in pyproject.toml, and no baseline: such a test could not fail.
    """
    __tracebackhide__ = True  # pytest shows the test's own line
    comparison = run(model, prompts, pyproject=pyproject, **options)
    if not any(one.limit is not None for one in comparison.metrics) and comparison.baseline is None:
        raise ConfigError(
            "assert_close_to_unpruned without a limit cannot fail: pass one, such as max_kl=0.02, or write it under"
            " [tool.lethe.compare] of pyproject.toml"
        )
    if not comparison.passed:
        raise AssertionError(failure_message(comparison))
    return comparison


def run(
    model: Any, prompts: str | Path | Iterable[Any], *, pyproject: str | Path | None = None, **options: Any
) -> Comparison:
    """`lethe_compile.compare`, with a prompts file in place of prompts if one is named, and limits by name."""
    from lethe_compile.comparison import Thresholds, compare, read_prompts, read_pyproject

    names = [one.name for one in fields(Thresholds)]
    given = Thresholds(**{name: options.pop(name) for name in names if name in options})
    stored, tolerance = read_pyproject(Path(pyproject or Path.cwd()))
    if "thresholds" in options:
        given = given.or_else(options.pop("thresholds"))
    if isinstance(prompts, (str, Path)):
        limit = {name: options[name] for name in ("max_new_tokens",) if name in options}
        prompts = read_prompts(prompts, options.get("tokenizer"), **limit)
    tolerance = {**tolerance, **(options.pop("tolerance", None) or {})}
    return compare(model, prompts, thresholds=given.or_else(stored), tolerance=tolerance, **options)


def failure_message(comparison: Comparison) -> str:
    """What failed, as a table for a test report."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    limited = [one for one in comparison.metrics if one.limit is not None]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("metric", "limit", "measured", "", "worst prompt"):
        table.add_column(title, justify="left" if title in ("metric", "worst prompt") else "right", overflow="fold")
    for one in limited:
        show = one.metric.show
        worst = "" if one.worst is None else f"{show(one.worst.value)} at {one.worst.where}"
        verdict = "ok" if one.passed else "FAILED"
        table.add_row(one.metric.title, one.metric.show_limit(one.limit), show(one.value), verdict, worst)
    console = Console(file=io.StringIO(), width=_WIDTH, force_terminal=False)
    if limited:
        console.print(table)
    failures = comparison.failures
    for line in failures:
        console.print(f"- {line}", soft_wrap=True, markup=False)
    assert isinstance(console.file, io.StringIO)
    head = f"pruning changes {comparison.facts['model']} by more than is allowed ({len(failures)} failed)"
    return "\n".join([head, *(line.rstrip() for line in console.file.getvalue().splitlines() if line.strip())])
