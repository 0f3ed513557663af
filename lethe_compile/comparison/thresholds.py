"""Limits that a comparison must keep: from a caller, from flags, or from ``[tool.lethe.compare]`` of pyproject.toml."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import inf
from pathlib import Path
from typing import Any

from lethe_compile.comparison.metrics import METRICS
from lethe_compile.errors import ConfigError, InputError
from lethe_compile.settings import Settings, number, optional, read_toml, setting

PYPROJECT = "pyproject.toml"
_TABLE = "[tool.lethe.compare]"
_AT_LEAST_0 = optional(number(">= 0", lambda v: 0 <= v < inf))
_SHARE = optional(number("in [0, 1]", lambda v: 0 <= v <= 1))
_SAVING = optional(number("in [0, 1)", lambda v: 0 <= v < 1))
_POSITIVE = optional(number("> 0", lambda v: 0 < v < inf))


@dataclass(frozen=True)
class Thresholds(Settings):
    """How much pruning may change, and what it must bring; None for no limit.

    Raises:
        ConfigError: a value that is not allowed, or limits that contradict each other.
    """

    max_kl: float | None = setting(None, _AT_LEAST_0)
    """KL(unpruned ‖ pruned) in nats, mean over teacher-forced steps."""

    min_top1: float | None = setting(None, _SHARE)
    """Share of teacher-forced steps at which both find the same token most likely."""

    max_ppl_increase: float | None = setting(None, _AT_LEAST_0)
    """Perplexity of the pruned graph over that of the unpruned one, less 1: 0.02 is 2%."""

    max_accuracy_drop: float | None = setting(None, _SHARE)
    """Share of answers that pruning costs: 0.02 is 2 points."""

    min_memory_saving: float | None = setting(None, _SAVING)
    """Share of the mean KV bytes of a sequence that pruning saves: 0.5 is half."""

    min_speedup: float | None = setting(None, _POSITIVE)
    """Tokens per second over those of the unpruned graph."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_kl == 0 and self.min_memory_saving:
            raise ConfigError(
                f"max_kl=0 and min_memory_saving={self.min_memory_saving:g} contradict each other: what evicts anything"
                " changes probabilities; raise max_kl, or drop min_memory_saving"
            )

    @property
    def given(self) -> dict[str, float]:
        """The limits that there are, by their own names."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def limits(self) -> dict[str, float]:
        """The limits that there are, by the metrics that they are about."""
        return {METRIC_OF[name]: value for name, value in self.given.items()}

    def or_else(self, other: Thresholds) -> Thresholds:
        """These, and those of `other` where these say nothing."""
        return Thresholds(**{**other.given, **self.given})

    def check(self, *, forced: bool, free: bool, graded: bool, evicts: bool) -> None:
        """Refuse limits on what will not be measured, or cannot be met.

        Raises:
            ConfigError: names the limit.
        """
        for name in self.given:
            if name in _FORCED and not forced:
                raise ConfigError(f"{name} is a limit on the teacher-forced run, which is switched off")
            if name in _FREE and not free:
                raise ConfigError(f"{name} is a limit on the free-running generation, which is switched off")
        if self.max_accuracy_drop is not None and not graded:
            raise ConfigError(
                f"max_accuracy_drop={self.max_accuracy_drop:g} needs answers to compare with, and no prompt has one:"
                " add 'answer' to the prompts, or drop the limit"
            )
        if self.min_memory_saving and not evicts:
            raise ConfigError(
                f"min_memory_saving={self.min_memory_saving:g} contradicts policy 'full', which evicts nothing"
            )


_FORCED = ("max_kl", "min_top1", "max_ppl_increase")
_FREE = ("max_accuracy_drop", "min_memory_saving", "min_speedup")
METRIC_OF = {
    "max_kl": "kl",
    "min_top1": "top1",
    "max_ppl_increase": "ppl_increase",
    "max_accuracy_drop": "accuracy_drop",
    "min_memory_saving": "memory_saving",
    "min_speedup": "speedup",
}
"""The metric that each limit is about."""


def read_pyproject(folder: Path) -> tuple[Thresholds, dict[str, float]]:
    """Limits, and tolerances towards a baseline, of ``[tool.lethe.compare]`` in the folder's pyproject.toml.

    Tolerances stand in its ``tolerance`` table, by metric. Both are empty where there is no such file or table.

    Raises:
        InputError: the file is not TOML; names it and the line.
        ConfigError: an unknown key, or a value that is not allowed.
    """
    path = folder / PYPROJECT
    table: Any = read_toml(path) if path.is_file() else {}
    for name in ("tool", "lethe", "compare"):
        if not isinstance(table, Mapping):
            raise InputError(f"{path}: {_TABLE} is not a table")
        table = table.get(name, {})
    if not isinstance(table, Mapping):
        raise InputError(f"{path}: {_TABLE} is not a table")
    values = dict(table)
    tolerance = check_tolerance(values.pop("tolerance", {}), f"{path}, tolerance of {_TABLE}")
    try:
        return Thresholds.from_dict(values, owner=_TABLE), tolerance
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def check_tolerance(values: Any, where: str) -> dict[str, float]:
    """Tolerances by metric. Raises `ConfigError` that begins with `where`."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: must say METRIC = NUMBER, and is {values!r}")
    for name, value in values.items():
        if name not in METRICS:
            raise ConfigError(f"{where}: {name!r} is no metric: there are {', '.join(METRICS)}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < inf:
            raise ConfigError(f"{where}: {name}={value!r} is not allowed: must be a number >= 0")
    return {name: float(value) for name, value in values.items()}
