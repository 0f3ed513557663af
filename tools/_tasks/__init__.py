"""The tasks of `lethe evaluate`, by name; one file each. `name:key=value,…` makes one with settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from lethe_compile.errors import InputError
from lethe_compile.evaluation import Task
from lethe_compile.evaluation.cells import parse_spec
from lethe_compile.tools._tasks.math_words import Gsm8k, Math500
from lethe_compile.tools._tasks.needle import Needle
from lethe_compile.tools._tasks.reasoner import FAMILIES, Reasoner

TASKS: Mapping[str, tuple[type[Any], Mapping[str, Any]]] = {
    "reasoner": (Reasoner, {}),
    **{family: (Reasoner, {"families": (family,)}) for family in FAMILIES},
    "gsm8k": (Gsm8k, {}),
    "math500": (Math500, {}),
    "needle": (Needle, {}),
}
"""Class and fixed settings by name."""


def make_task(spec: str) -> Task:
    """The task that a command line or a sweep names.

    Raises:
        InputError: an unknown name or setting, or a value that the task does not take.
    """
    name, settings = parse_spec(spec)
    if name not in TASKS:
        close = get_close_matches(name, TASKS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise InputError(f"there is no task {name!r}: tasks are {', '.join(TASKS)}{hint}")
    make, fixed = TASKS[name]
    known = [field.name for field in fields(make) if field.init and field.name not in ("name", *fixed)]
    for key in settings:
        if key not in known:
            raise InputError(f"task {name!r} has no setting {key!r}: it has {', '.join(known) or 'none'}")
    check: Callable[..., Task] = make
    try:
        return check(name=spec.replace("/", "|"), **fixed, **settings)
    except TypeError as error:
        raise InputError(f"task {spec!r}: {error}") from error
