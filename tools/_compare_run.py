"""What `lethe compare` does with its options: all is checked first, then run under a bar; and what is written of it."""

from __future__ import annotations

import argparse
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from lethe_compile.api import optimize
from lethe_compile.artifact import load_manifest
from lethe_compile.comparison import (
    Case,
    Comparison,
    Progress,
    Thresholds,
    compare,
    read_prompts,
    read_pyproject,
    task_cases,
    write_baseline,
)
from lethe_compile.comparison.junit import write_junit
from lethe_compile.comparison.thresholds import check_tolerance
from lethe_compile.config import LetheConfig
from lethe_compile.errors import ConfigError, InputError
from lethe_compile.evaluation.cells import make_config
from lethe_compile.policies.full import FullPolicy
from lethe_compile.runtime import OptimizedModel
from lethe_compile.tools import _models, _policies
from lethe_compile.tools._devices import check_device, default_device
from lethe_compile.tools.compare import FAILED


def run(options: argparse.Namespace) -> int:
    """The whole command; its exit status."""
    limits, tolerance = _limits(options)
    config = _config(options)
    _check(options)
    console, errors = Console(), Console(stderr=True)
    tokenizer = _tokenizer(options)
    cases = _cases(options, tokenizer)
    forced, free = options.only != "free", options.only != "forced"
    evicts = options.artifact is not None or config.policy != FullPolicy.name
    limits.check(forced=forced, free=free, graded=any(case.grader for case in cases), evicts=evicts)
    with _bar(errors) as bar:
        line = bar.add_task(f"loading {options.model}", total=None)
        fast = _optimize(options, config, lambda text: bar.update(line, description=text))

        def progress(now: Progress) -> None:
            bar.update(line, description=now.stage, completed=now.done, total=now.total)

        comparison = compare(
            fast, cases, artifact=options.artifact, tokenizer=tokenizer, thresholds=limits,
            baseline=None if options.update_baseline else options.baseline, tolerance=tolerance,
            batch_size=options.batch_size, forced=forced, free=free, repeats=options.repeats,
            max_prompt_tokens=options.max_prompt_tokens, name=options.model, progress=progress,
        )  # fmt: skip
    _show(options, comparison, console)
    _write(options, comparison, fast, cases, tokenizer, console)
    return 0 if comparison.passed else FAILED


# ------------------------------------------------------------------------------------------------------------- options


def _limits(options: argparse.Namespace) -> tuple[Thresholds, dict[str, float]]:
    """Limits and tolerances: flags, else pyproject.toml."""
    flags = Thresholds(**{field.name: getattr(options, field.name) for field in fields(Thresholds)})
    stored, tolerance = read_pyproject(Path.cwd())
    return flags.or_else(stored), {**tolerance, **_tolerance(options.tolerance)}


def _tolerance(given: list[str]) -> dict[str, float]:
    values: dict[str, Any] = {}
    for one in given:
        name, _, value = one.partition("=")
        try:
            values[name] = float(value)
        except ValueError as error:
            raise InputError(f"--tolerance {one}: must be METRIC=NUMBER, such as kl=0.1") from error
    return check_tolerance(values, "--tolerance")


def _config(options: argparse.Namespace) -> LetheConfig:
    """The settings of `--policy`, its options, the caps, and `--set`, each given once."""
    settings: dict[str, Any] = dict(_policies.options_of(options.set, "--set"))
    own = {**_policies.options_of(options.policy_option)}
    for name, value in (("max_tokens", options.max_tokens), ("budget", options.budget)):
        if value is not None:
            if name in settings:
                raise ConfigError(f"--set {name} and --{name.replace('_', '-')} contradict each other: give one")
            settings[name] = value
    return make_config(options.policy, {**settings, **({"policy_options": own} if own else {})})


def _check(options: argparse.Namespace) -> None:
    """What can be refused before anything is loaded."""
    check_device(options.device or default_device())
    if options.prompts is not None and options.tasks:
        raise InputError("--prompts and --task contradict each other: give one")
    if options.prompts is None and not options.tasks and options.model != _models.REASONER:
        raise InputError("there is nothing to compare on: give --prompts FILE.jsonl, or --task TASK")
    if options.update_baseline and options.baseline is None:
        raise InputError("--update-baseline records into --baseline FILE: name one")
    for name in ("problems", "max_new_tokens", "batch_size", "repeats"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(options, name)}: must be at least 1")
    if options.artifact is not None:
        load_manifest(options.artifact, verify=False)
    if options.html is not None and find_spec("plotly") is None:
        raise InputError("--html draws with plotly: pip install 'lethe-compile[report]'")
    for name in ("json", "junit", "html", "baseline"):
        path = getattr(options, name)
        if path is not None and not path.absolute().parent.is_dir():
            raise InputError(f"--{name} {path}: there is no directory {path.absolute().parent}")


def _tokenizer(options: argparse.Namespace) -> Any:
    """The tokenizer, None where MODEL has none: prompts of token ids need none, and others say that they do."""
    if options.tokenizer is not None:
        return _models.load_tokenizer(options.tokenizer)
    try:
        return _models.load_tokenizer(options.model)
    except InputError:
        return None


def _cases(options: argparse.Namespace, tokenizer: Any) -> list[Case]:
    if options.prompts is not None:
        return read_prompts(options.prompts, tokenizer, options.max_new_tokens)
    from lethe_compile.tools._tasks import make_task

    tasks = [make_task(spec) for spec in options.tasks or [_models.REASONER]]
    return [case for task in tasks for case in task_cases(task, options.problems, options.seed, tokenizer)]


def _optimize(options: argparse.Namespace, config: LetheConfig, say: Any) -> OptimizedModel:
    model = _models.load_model(options.model).to(options.device or default_device())
    if options.dtype != "auto":
        model = model.to(getattr(torch, options.dtype))
    say("compiling")
    return optimize(model, config, policy=None if options.artifact is None else FullPolicy.name)


def _bar(console: Console) -> Bar:
    columns = (TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn())
    return Bar(*columns, console=console, transient=True, disable=not console.is_terminal)


# ------------------------------------------------------------------------------------------------------------- outputs


def _show(options: argparse.Namespace, comparison: Comparison, console: Console) -> None:
    if not options.quiet:
        console.print(comparison)
        return
    failures = comparison.failures
    console.print("passed" if not failures else "FAILED", style="red" if failures else "green")
    for one in failures:
        console.print(f"  {one}", markup=False, soft_wrap=True)


def _write(
    options: argparse.Namespace,
    comparison: Comparison,
    fast: OptimizedModel,
    cases: list[Case],
    tokenizer: Any,
    console: Console,
) -> None:
    written = []
    if options.json is not None:
        _write_text(options.json, comparison.to_json(indent=1) + "\n")
        written.append(options.json)
    if options.junit is not None:
        write_junit(options.junit, comparison)
        written.append(options.junit)
    if options.update_baseline:
        write_baseline(comparison, options.baseline)
        written.append(options.baseline)
    if options.html is not None:
        _write_html(options.html, comparison, fast, cases, tokenizer)
        written.append(options.html)
    for path in written if not options.quiet else ():
        console.print(f"wrote {path}", style="dim", markup=False, soft_wrap=True)


def _write_text(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from error


def _write_html(path: Path, comparison: Comparison, fast: OptimizedModel, cases: list[Case], tokenizer: Any) -> None:
    """The report, with a recording of the prompt that suffers most, generated once more."""
    from lethe_compile.viewer import write_report

    recording = None
    if fast.policy.name != FullPolicy.name:
        worst = comparison.worst_first()[0].id
        recording = _record(fast, next(case for case in cases if case.problem.id == worst), tokenizer, comparison)
    graph = fast.inspection(comparison.facts["model"]).to_dict()
    write_report(path, comparison=comparison.to_dict(), recording=recording, graph=graph)


def _record(fast: OptimizedModel, case: Case, tokenizer: Any, comparison: Comparison) -> dict[str, Any]:
    from lethe_compile.evaluation.engine import end_tokens, write
    from lethe_compile.recording import make_recording, words_of

    with fast.recorded(tokens=True) as recorder:
        written, _ = write(fast, [case.problem], end_tokens(fast, tokenizer), do_sample=False)
    name = f"{comparison.facts['model']}, {case.problem.id}"
    return make_recording(fast, recorder, [case.problem.prompt], written, words_of(tokenizer), model=name)
