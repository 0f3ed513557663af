"""The directory of an evaluation: what was asked for in `run.json`, and one line a problem in `results.jsonl`.

Lines are appended and synced as they come, so that a run killed at any moment loses the batches under way and no more.
A last line that was cut short is dropped when the run goes on; any other broken line is an error, with its number.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lethe_compile.errors import InputError

FORMAT = 1
RUN, RESULTS, TIMELINES = "run.json", "results.jsonl", "timelines.jsonl"

Record = dict[str, Any]
"""One problem in one cell: `cell` and `problem` name them, the rest is what `engine.ModelEngine.run` says of it."""


class Journal:
    """Results so far, by cell and problem; a context that holds the file open.

    Args:
        folder: made if it does not exist.
        facts: what makes results comparable: model, tasks, seed. A run that goes on must have the same.
        cells: full settings by cell id. A run that goes on may add some.

    Raises:
        InputError: the folder holds a run of other facts, or another format, or a broken line, or another process
            is writing to it.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any], cells: Mapping[str, Any]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / RESULTS
        known = self._check(json.loads(json.dumps(facts)), json.loads(json.dumps(cells)))
        self._file = self.path.open("a", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(f"another process writes to {folder}: wait for it, or use another directory") from error
        self.records: dict[tuple[str, str], Record] = {
            (r["cell"], r["problem"]): r for r in _read(self.path, ("cell", "problem", "score"))
        }
        self.timelines: list[Record] = _read(folder / TIMELINES, ("cell", "steps", "retained", "sparsity"))
        write_whole(folder / RUN, json.dumps({"format": FORMAT, **facts, "cells": {**known, **cells}}, indent=1) + "\n")

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, records: Iterable[Record], timeline: Record) -> None:
        """Append a batch; on return it is on the disk."""
        records = list(records)
        with (self.folder / TIMELINES).open("a", encoding="utf-8") as file:
            file.write(json.dumps(timeline) + "\n")
        self.timelines.append(timeline)
        self._file.write("".join(json.dumps(record) + "\n" for record in records))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.records.update({(record["cell"], record["problem"]): record for record in records})

    def _check(self, facts: Record, cells: Record) -> Record:
        """The cells of the run that is there already."""
        file = self.folder / RUN
        if not file.exists():
            if self.path.exists():
                raise InputError(f"{self.path} has results, but {file} does not say of what: write to a new directory")
            return {}
        try:
            before = json.loads(file.read_text())
        except ValueError as error:
            raise InputError(f"{file} is not JSON ({error}): write to a new directory") from error
        if before.get("format") != FORMAT:
            raise InputError(f"{file} is of format {before.get('format')!r}, not {FORMAT}: write to a new directory")
        known: Record = before["cells"]
        pairs = [(name, before.get(name), value) for name, value in facts.items()]
        pairs += [(f"cell {name!r}", known[name], value) for name, value in cells.items() if name in known]
        for name, old, new in pairs:
            if old != new:
                raise InputError(
                    f"{self.folder} holds a run with another {_difference(name, old, new)}: repeat its settings to go "
                    "on with it, or write to a new directory"
                )
        return known


def _difference(name: str, old: Any, new: Any) -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        key = next(key for key in (*new, *old) if old.get(key) != new.get(key))
        return _difference(f"{name}, {key}", old.get(key), new.get(key))
    return f"{name} ({json.dumps(old)}, now {json.dumps(new)})"


def _read(path: Path, keys: Sequence[str]) -> list[Record]:
    """All whole lines; what a kill left of the last one is cut off."""
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    records = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            record = json.loads(line)
            [record[key] for key in keys]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}, line {number}: not a result ({error}); delete that line to go on") from error
        records.append(record)
    return records


def write_whole(path: Path, text: str) -> None:
    """Replace a file at once: whoever reads it finds the old or the new one, whole."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
