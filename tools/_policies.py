"""Policies on a command line: `--policy`, `--policy-option NAME=VALUE`, and budgets of every kind."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from lethe_compile.config import LetheConfig
from lethe_compile.errors import InputError
from lethe_compile.files import read_json
from lethe_compile.policies import policy_names


class _Parser(Protocol):
    def add_argument(self, *names: str, **options: Any) -> Any: ...


def add_arguments(parser: _Parser) -> None:
    """`--policy` and `--policy-option`, which `options_of` reads."""
    names = ", ".join(policy_names())
    default = LetheConfig().policy
    parser.add_argument("--policy", default=default, metavar="NAME", help=f"one of {names} (default {default})")
    parser.add_argument(
        "--policy-option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting of the policy's own, such as importance=0.1 of rkv; may be given several times",
    )


def options_of(given: Iterable[str], flag: str = "--policy-option") -> Mapping[str, Any]:
    """`NAME=VALUE` each as a mapping; values are JSON where they can be (0.1, true), else text.

    Raises:
        InputError: no `=`, or a name given twice.
    """
    options: dict[str, Any] = {}
    for one in given:
        name, equals, value = one.partition("=")
        if not (name and equals):
            raise InputError(f"{flag} {one}: must be NAME=VALUE")
        if name in options:
            raise InputError(f"{flag} {name} is given twice")
        options[name] = _value(value)
    return options


def read_config(path: Path | None) -> dict[str, Any]:
    """Settings of `LetheConfig` from the JSON file of `--config`; none without one.

    Raises:
        InputError: the file cannot be read, or holds no JSON object.
    """
    values = {} if path is None else read_json(path, "a file of settings")
    if not isinstance(values, dict):
        raise InputError(f"{path} is not a file of settings: it holds a {type(values).__name__}, not a JSON object")
    return values


def budget(text: str) -> int | float | str:
    """A budget as `LetheConfig` takes it: tokens "4096", a share "0.125", or bytes "64MiB"; checked there."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
