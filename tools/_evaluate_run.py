"""What `lethe evaluate` does with its options: a plan, the run with a progress bar, and what is written of it."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from lethe_compile.api import optimize
from lethe_compile.evaluation import Cell, Evaluation, ModelEngine, Problem, Progress, Task, evaluate, make_cells
from lethe_compile.evaluation.cells import FULL, check_layers
from lethe_compile.evaluation.journal import Record, write_whole
from lethe_compile.evaluation.tables import markdown, terminal
from lethe_compile.tools import _models
from lethe_compile.tools._evaluate_options import Options, read_options
from lethe_compile.tools._tasks import make_task
from lethe_compile.tools.evaluate import INCOMPLETE


@dataclass(frozen=True)
class MakeEngine:
    """Loads the model and captures it, in whichever process calls; cells are configured later."""

    model: str
    tokenizer: str | None
    device: str
    dtype: str
    tasks: tuple[Task, ...]
    sampling: dict[str, Any]
    seed: int

    def __call__(self) -> ModelEngine:
        model = _models.load_model(self.model).to(self.device)
        if self.dtype != "auto":
            model = model.to(getattr(torch, self.dtype))
        tokenizer = _models.load_tokenizer(self.tokenizer or self.model)
        make = partial(optimize, model)
        return ModelEngine(make, tokenizer, self.tasks, sampling=self.sampling, seed=self.seed)


def run(namespace: argparse.Namespace) -> int:
    """The whole command; its exit status."""
    options = read_options(namespace)
    cells = make_cells(options.policies, options.budgets, options.batches, options.pack)
    check_layers(cells, _models.count_layers(options.model))
    tasks = tuple(make_task(spec) for spec in options.tasks)
    tokenizer = _models.load_tokenizer(options.tokenizer or options.model)
    problems = [problem for task in tasks for problem in task.problems(options.problems, options.seed, tokenizer)]
    problems = _mixed(problems, len(tasks))
    sampling = _sampling(options)
    make = MakeEngine(options.model, options.tokenizer, options.device, options.dtype, tasks, sampling, options.seed)
    console, errors = Console(), Console(stderr=True)
    facts = _facts(options, sampling, problems)
    bar = _bar(errors)
    line = bar.add_task("starting", total=None)

    def progress(now: Progress) -> None:
        bar.start()  # only now: a refusal is one line and no bar
        bar.update(line, total=now.wanted, completed=now.done, description=now.cell or "starting")
        if now.failed is not None:
            errors.print(f"failed: {now.failed}", style="red", markup=False)
            errors.print(now.failed.details, style="dim", markup=False)

    try:
        done = evaluate(
            make, cells, problems, options.out, facts,
            processes=options.processes, threads=options.threads, time_limit=options.time_limit, seed=options.seed,
            progress=progress,
        )  # fmt: skip
    finally:
        if bar.live.is_started:
            bar.stop()
    console.print(terminal(done.figures, console.width))
    for path in _write(options, facts, done, cells):
        console.print(str(path), style="dim", markup=False, soft_wrap=True)
    return _status(options, done, errors)


def _mixed(problems: Sequence[Problem], tasks: int) -> list[Problem]:
    """Task by task in turn, so that a cell of the first few has some of each."""
    share = len(problems) // tasks
    return [problems[task * share + i] for i in range(share) for task in range(tasks)]


def _sampling(options: Options) -> dict[str, Any]:
    if not options.temperature:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p, "top_k": 0}


def _facts(options: Options, sampling: dict[str, Any], problems: Sequence[Problem]) -> Record:
    """What results depend on, beside the cells. A digest of prompts tells another file of problems."""
    prompts = json.dumps([(problem.id, problem.prompt, problem.max_new_tokens) for problem in problems])
    names = ("model", "tasks", "problems", "seed", "dtype", "tokenizer")
    facts = {name: getattr(options, name) for name in names}
    device = torch.device(options.device).type
    return {
        **facts,
        "device": device,
        "sampling": sampling,
        "prompts": hashlib.sha256(prompts.encode()).hexdigest()[:16],
    }


def _bar(console: Console) -> Bar:
    columns = (BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    return Bar(*columns, TextColumn("[dim]{task.description}", markup=True), console=console)


def _status(options: Options, done: Evaluation, errors: Console) -> int:
    if done.failures:
        errors.print(f"{len(done.failures)} batches failed; run the same command to try them again", style="red")
        return 1
    if not done.complete:
        errors.print(f"the time limit of {options.time_limit:g} s was reached; run the same command to go on")
        return INCOMPLETE
    return 0


# ------------------------------------------------------------------------------------------------------------ outputs


def _write(options: Options, facts: Record, done: Evaluation, cells: Sequence[Cell]) -> list[Path]:
    """`summary.json`, `summary.md` and the plots."""
    folder = options.out
    summary = {
        "command": "lethe evaluate " + " ".join(sys.argv[2:]),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "complete": done.complete,
        "seconds": round(done.seconds, 1),
        "processes": options.processes,
        "machine": _machine(options.device),
        **facts,
        "configs": {cell.id: cell.config.to_dict() for cell in cells},
        **done.figures.to_dict(),
        "failures": [str(failed) for failed in done.failures],
    }
    files = [folder / "summary.json", folder / "summary.md"]
    write_whole(files[0], json.dumps(summary, indent=1, allow_nan=False) + "\n")
    headline = f"{options.model}, {', '.join(options.tasks)}; {_machine(options.device)['device']}, {summary['date']}"
    write_whole(files[1], markdown(done.figures, headline, done.failures))
    return files if options.no_plots or not done.figures.cells else [*files, *_plots(options, done)]


def _plots(options: Options, done: Evaluation) -> list[Path]:
    from lethe_compile.evaluation import plots

    title, files = f"{options.model}: {', '.join(options.tasks)}", []
    groups = dict.fromkeys(cell.group for cell in done.figures.cells if cell.policy != FULL)
    for group in groups:
        stem = options.out / f"pareto-{_slug(group)}"
        files += plots.pareto(done.figures, group, f"{title} ({group})" if len(groups) > 1 else title, stem)
    first = next(iter(groups), "")
    shown = [cell for cell in done.figures.cells if cell.group == first]
    for curve in dict.fromkeys(cell.curve for cell in shown):
        points = sorted((cell for cell in shown if cell.curve == curve), key=lambda cell: cell.kv_mean)
        middle = points[len(points) // 2]
        if (timeline := done.timelines.get(middle.id)) and timeline["steps"]:
            name = f"{curve}, {middle.budget}" if middle.budget else curve
            label = f"{name}: mean of {timeline['rows']} sequences of {options.model}"
            files += plots.heat_map(timeline, label, options.out / f"layers-{_slug(name)}")
    return files


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower()


def _machine(device: str) -> Record:
    where = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "CPU"
    return {
        "device": where,
        "threads": torch.get_num_threads(),
        **{name: metadata.version(name) for name in ("torch", "transformers")},
    }
