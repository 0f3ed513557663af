"""The options of `lethe evaluate`: the command line over a sweep file over the defaults, checked before any work."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from lethe_compile.errors import InputError
from lethe_compile.files import read_json
from lethe_compile.settings import read_toml
from lethe_compile.tools._devices import check_device, default_device


@dataclass(frozen=True)
class Options:
    """See `lethe evaluate --help`. In a sweep file `policies` may be tables; see `evaluation.make_cells`."""

    model: str
    out: Path
    tasks: list[str]
    policies: list[Any]
    budgets: list[Any]
    batches: list[int]
    pack: int | None
    problems: int
    processes: int
    threads: int | None
    device: str
    dtype: str
    tokenizer: str | None
    seed: int
    temperature: float
    top_p: float
    time_limit: float | None
    no_plots: bool


_DEFAULTS: dict[str, Any] = {
    "tasks": ["reasoner"],
    "policies": ["full", "lethe"],
    "budgets": [],
    "batches": [16],
    "pack": None,
    "problems": 64,
    "processes": 1,
    "threads": None,
    "dtype": "auto",
    "tokenizer": None,
    "seed": 0,
    "temperature": 0.0,
    "top_p": 1.0,
    "time_limit": None,
}


def read_options(namespace: argparse.Namespace) -> Options:
    """Raises `InputError` for a sweep file that cannot be read, or a value that is not allowed; names it."""
    given = {name: value for name, value in vars(namespace).items() if value is not None and name != "sweep"}
    sweep = {} if namespace.sweep is None else _read_sweep(namespace.sweep)
    values = {**_DEFAULTS, "device": default_device(), **sweep, **given}
    if "model" not in values:
        raise InputError("name a MODEL, on the command line or in the sweep file")
    for name, least in (("problems", 1), ("processes", 1), ("threads", 1), ("pack", 1)):
        value = values[name]
        if value is not None and (not isinstance(value, int) or value < least):
            raise InputError(f"{name}={value!r} is not allowed: must be a whole number from {least} on")
    if values["time_limit"] is not None and not values["time_limit"] > 0:
        raise InputError(f"time_limit={values['time_limit']!r} is not allowed: must be a number of seconds above 0")
    if values["temperature"] < 0 or not 0 < values["top_p"] <= 1:
        raise InputError("temperature must be 0 or more, and top_p in (0, 1]")
    check_device(values["device"])
    return Options(**values)


def _read_sweep(path: Path) -> Mapping[str, Any]:
    values = read_json(path, "a sweep") if path.suffix == ".json" else read_toml(path)
    known = {field.name for field in fields(Options)} - {"out", "no_plots"}
    for name in values:
        if name not in known:
            close = get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise InputError(f"{path}: a sweep has no {name!r}: it may say {', '.join(sorted(known))}{hint}")
    return dict(values)
