"""`lethe inspect --matrix`: every architecture checked, as a table, JSON and Markdown."""

from __future__ import annotations

import importlib.metadata
import json
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from lethe_compile.errors import InputError
from lethe_compile.models.architectures import ARCHITECTURES
from lethe_compile.tools._matrix_checks import Verdict, check

_COLUMNS = ("architecture", "layers", "found by", "masks", "features", "verdict", "s")
_STYLES = {"pass": "green", "refused": "yellow", "fail": "red"}


def run(names: Sequence[str], json_file: Path | None, markdown: Path | None, device: str = "cpu") -> int:
    """Check the named architectures, all without names; files are written after each, so that none is lost.

    Returns 1 if one of them fails: a refusal with its reason is no failure.
    """
    if unknown := [name for name in names if name not in ARCHITECTURES]:
        raise InputError(f"no architecture is called {', '.join(unknown)}; there are {', '.join(ARCHITECTURES)}")
    if device == "cuda":
        if not torch.cuda.is_available():
            raise InputError("--device cuda needs a CUDA GPU, and torch sees none")
        torch.set_float32_matmul_precision("highest")  # TF32 would drown what is compared
    verdicts: list[Verdict] = []
    for name in (bar := tqdm(names or ARCHITECTURES, unit=" architectures")):
        bar.set_postfix_str(name)
        verdicts.append(check(name, device))
        if json_file is not None:
            json_file.write_text(json.dumps(to_dict(verdicts, device), indent=1) + "\n")
        if markdown is not None:
            markdown.write_text(to_markdown(verdicts))
    Console().print(_table(verdicts))
    Console().print(summary(verdicts))
    return int(any(v.outcome == "fail" for v in verdicts))


def to_dict(verdicts: Sequence[Verdict], device: str) -> dict[str, Any]:
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "command": "lethe inspect --matrix",
        **versions,
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "threads": torch.get_num_threads(),
        "verdicts": [v.to_dict() for v in verdicts],
    }


def summary(verdicts: Sequence[Verdict]) -> str:
    counts = Counter(v.outcome for v in verdicts)
    return f"{counts['pass']} of {len(verdicts)} pass, {counts['refused']} refused, {counts['fail']} failed"


def to_markdown(verdicts: Sequence[Verdict]) -> str:
    """A table for a README."""
    lines = [f"| {' | '.join(_COLUMNS)} |", "|---|---:|---|---|---|---|---:|"]
    lines += [f"| {' | '.join(cell.replace('|', ' ') for cell in _cells(v))} |" for v in verdicts]
    return "\n".join([*lines, "", summary(verdicts), ""])


def _cells(v: Verdict) -> list[str]:
    words = v.outcome if not v.reason else f"{v.outcome}: {v.reason}"
    return [v.architecture, str(v.layers or ""), v.found_by, v.masks, v.features, words, f"{v.seconds:.0f}"]


def _table(verdicts: Sequence[Verdict]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in _COLUMNS:
        table.add_column(column, justify="right" if column in ("layers", "s") else "left", overflow="fold")
    for verdict in verdicts:
        table.add_row(*_cells(verdict), style=_STYLES[verdict.outcome])
    return table
