"""Sweeps as points of accuracy over bytes: a `summary.json` of `lethe evaluate`, or figures of `tools/results`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lethe_compile.errors import InputError
from lethe_compile.files import read_json

FULL = "full"
_SETTING = re.compile(r"\s+\w+=\S+")


def read_sweep(path: Path) -> dict[str, Any]:
    """What a sweep measured.

    Returns:
        {model, title, note, points: [{group, curve, label, kv, accuracy, low, high, new_tokens, terminated}]}: bytes
        of a sequence, percent, and None for what the file does not say. The full cache is the curve "full", which
        not every group has.

    Raises:
        InputError: the file cannot be read, or holds no sweep; says which, and why.
    """
    read = read_json(path, "a sweep")
    try:
        points = _points(read)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no sweep of a form that is known: {type(error).__name__} {error}") from error
    if not points:
        raise InputError(f"{path} holds no cells: 'cells' of lethe evaluate, or 'policies' with 'cells'")
    return {"model": read.get("model"), "title": _title(read), "note": str(read.get("note", "")), "points": points}


def _title(read: Mapping[str, Any]) -> str:
    machines = [part.get("machine") for part in [read, *_sections(read).values()]]
    devices = dict.fromkeys(machine["device"] for machine in machines if machine)
    problems = f"{read['problems']} problems" if "problems" in read else None
    parts = [read.get("model"), ", ".join(read.get("tasks", [])), problems, *devices, read.get("date")]
    return ", ".join(str(part) for part in parts if part)


def _sections(read: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Runs that a file of `tools/results` holds, by name."""
    return {name: part for name, part in read.items() if isinstance(part, Mapping) and "cells" in part}


def _points(read: Mapping[str, Any]) -> list[dict[str, Any]]:
    if "cells" in read:
        return [_evaluated(cell) for cell in read["cells"]]
    return [_stored(cell, name) for name, part in _sections(read).items() for cell in part["cells"]]


def _evaluated(cell: Mapping[str, Any]) -> dict[str, Any]:
    """A cell of `lethe evaluate`."""
    score = cell["score"]
    label = f"{cell['curve']}, {cell['budget']}" if cell["budget"] else cell["curve"]
    return {
        "group": cell["group"], "curve": FULL if cell["policy"] == FULL else cell["curve"], "label": label,
        "kv": cell["kv_mean"], "accuracy": 100 * score["value"], "low": 100 * score["low"], "high": 100 * score["high"],
        "new_tokens": cell["new_tokens"], "terminated": 100 * cell["terminated"],
    }  # fmt: skip


def _stored(cell: Mapping[str, Any], section: str) -> dict[str, Any]:
    """A cell of `tools/results`: a policy with its cap, or a curve of a group with its budget."""
    name = cell.get("policy") or cell["curve"]
    cap = cell.get("budget") or (f"max_tokens={cell['max_tokens']}" if cell.get("max_tokens") else "")
    curve = name if cap or "group" in cell else _SETTING.sub("", name)  # without caps, a setting is what varies
    return {
        "group": f"{section}: {cell['group']}" if "group" in cell else section,
        "curve": curve, "label": f"{name}, {cap}" if cap else name,
        "kv": cell["kv_mean_bytes"], "accuracy": cell["accuracy"], "low": cell["ci"][0], "high": cell["ci"][1],
        "new_tokens": cell.get("new_tokens"), "terminated": cell.get("terminated"),
    }  # fmt: skip
