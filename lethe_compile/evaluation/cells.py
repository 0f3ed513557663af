"""A cell of an evaluation: one policy with its settings, at one batch size. How command lines and sweeps name them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from itertools import product
from typing import Any

from lethe_compile.config import LetheConfig
from lethe_compile.errors import ConfigError, InputError
from lethe_compile.policies import make_policy

FULL = "full"
_FIELDS = [field.name for field in fields(LetheConfig)]
_OPTIONS = "policy_options"  # where a policy's own settings go
_ANY_CAP = 1024  # of a policy that is made only to see its options: some refuse to be made without
_WORDS = {"true": True, "false": False, "none": None}


@dataclass(frozen=True)
class Cell:
    """One line of the table.

    Attributes:
        config: policy, budget and settings.
        batch: sequences that share a batch. Where rows do not influence each other it says how fast, not how well.
        curve: what cells that differ in nothing but budget and batch have in common; a line of the plot.
        group: tables are grouped by it, and plots show one group each.
        problems: how many of the problems it is run on, from the first; None for all.
    """

    config: LetheConfig
    batch: int
    curve: str
    group: str = "policies"
    problems: int | None = None

    @property
    def id(self) -> str:
        """Unique among cells of different settings, and readable: it names the cell in `results.jsonl`."""
        limit = "" if self.problems is None else f" first {self.problems}"
        return f"{describe(self.config)} batch={self.batch}{limit}"

    @property
    def is_full(self) -> bool:
        return self.config.policy == FULL

    @property
    def coupled(self) -> bool:
        """Whether rows of a batch influence each other, so that accuracy depends on the batch."""
        return make_policy(self.config).couples_rows

    @property
    def budget(self) -> str:
        """Its caps in words."""
        caps = [(name, getattr(self.config, name)) for name in ("max_tokens", "budget")]
        return ", ".join(f"{name}={value}" for name, value in caps if value is not None)


def describe(config: LetheConfig, without: Sequence[str] = ()) -> str:
    """The policy and every setting that is not at its default, but those left out: ``lethe sparse_ratio=100``."""
    plain = LetheConfig(policy=config.policy)
    changed = [
        f"{name}={_text(getattr(config, name))}"
        for name in _FIELDS
        if name != "policy" and name not in without and getattr(config, name) != getattr(plain, name)
    ]
    return " ".join([config.policy, *changed])


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}={value[key]}" for key in sorted(value)) + "}"
    return f"{value:g}" if isinstance(value, float) else str(value)


# ------------------------------------------------------------------------------------------------------------ reading


def parse_spec(text: str) -> tuple[str, dict[str, Any]]:
    """``name:key=value,…`` as name and settings; values are Python's, true, false and none, or plain words.

    Raises:
        InputError: no name, or something that is not key=value.
    """
    name, colon, rest = text.partition(":")
    if not name.strip() or (colon and not rest.strip()):
        raise InputError(f"{text!r} is not NAME or NAME:KEY=VALUE,KEY=VALUE")
    settings: dict[str, Any] = {}
    for part in re.split(r",(?![^\[({]*[\])}])", rest) if rest else []:  # commas inside brackets belong to a value
        key, equals, value = part.partition("=")
        if not equals or not key.strip():
            raise InputError(f"{part!r} in {text!r} is not KEY=VALUE")
        settings[key.strip()] = _value(value.strip())
    return name.strip(), settings


def _value(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def parse_budget(value: int | float | str) -> dict[str, Any]:
    """Settings of a budget: a whole number is tokens of each layer, ``total=N`` tokens of all layers together.

    Whatever else `LetheConfig.budget` takes is handed on as it is: a fraction such as 0.125, or bytes such as
    ``64MiB``.

    Raises:
        InputError: nothing at all.
    """
    if isinstance(value, str):
        if not value.strip():
            raise InputError("an empty budget: give tokens a layer, total=TOKENS, or what LetheConfig.budget takes")
        if value.startswith("total="):
            return {"budget": _value(value.removeprefix("total="))}
        value = _value(value.strip())
    return {"max_tokens": value} if isinstance(value, int) else {"budget": value}


def make_config(policy: str, settings: Mapping[str, Any]) -> LetheConfig:
    """A `LetheConfig`; settings that are not its own are the policy's options.

    Raises:
        ConfigError: an unknown policy or setting, or a value that is not allowed.
    """
    own = {key: value for key, value in settings.items() if key in _FIELDS}
    rest = {key: value for key, value in settings.items() if key not in _FIELDS}
    options = type(make_policy(LetheConfig(policy=policy, max_tokens=_ANY_CAP))).Options
    known = [*_FIELDS, *(field.name for field in fields(options))]
    for key in rest:
        if key not in known:
            nearest = get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise ConfigError(f"{key!r} is no setting of policy {policy!r}; the nearest is {nearest!r}")
    if rest:
        own[_OPTIONS] = {**own.get(_OPTIONS, {}), **rest}
    config = LetheConfig.from_dict({"policy": policy, **own})
    make_policy(config)
    return config


def make_cells(
    policies: Iterable[str | Mapping[str, Any]],
    budgets: Sequence[int | float | str] = (),
    batches: Sequence[int] = (1,),
    pack: int | None = None,
) -> list[Cell]:
    """Policies × their varied settings × budgets × batch sizes, `full` once for all budgets.

    Cells of different curves or groups may have the same id: they are run once and shown in each.

    A policy is ``name:key=value,…`` or a mapping: `policy` is that text, and it may say `label`, `group`, `problems`,
    `budgets`, `batches` and `pack` in place of the arguments, `settings`, and `vary`, a list of values for each of
    some settings. With `pack`, policies whose rows do not influence each other run once, so many rows at a time, in
    place of every batch size.

    Raises:
        InputError, ConfigError: what cannot be read, or is not allowed; names the policy.
    """
    cells: dict[tuple[str, str, str], Cell] = {}
    for entry in policies:
        shared: dict[str, Any] = {"budgets": budgets, "batches": batches, "pack": pack}
        given = {"policy": entry} if isinstance(entry, str) else dict(entry)
        for cell in _expand({**shared, **given}):
            cells.setdefault((cell.id, cell.curve, cell.group), cell)
    if not cells:
        raise InputError("nothing to evaluate: name at least one policy")
    return list(cells.values())


_KEYS = {"policy", "label", "group", "problems", "budgets", "batches", "pack", "settings", "vary"}


def _expand(entry: Mapping[str, Any]) -> list[Cell]:
    if unknown := sorted(set(entry) - _KEYS):
        raise InputError(f"a policy of a sweep has no {unknown[0]!r}: it may say {', '.join(sorted(_KEYS))}")
    if "policy" not in entry:
        raise InputError(f"an entry of a sweep does not name its policy: {dict(entry)}")
    name, settings = parse_spec(str(entry["policy"]))
    label = settings.pop("label", entry.get("label"))
    settings.update(entry.get("settings", {}))
    varied = {key: values if isinstance(values, list) else [values] for key, values in entry.get("vary", {}).items()}
    rows = _positive(entry["batches"], "batch size")
    cells = []
    for combination in product(*varied.values()):
        chosen = dict(zip(varied, combination, strict=True))
        for budget in entry["budgets"] if entry["budgets"] and name != FULL else (None,):
            capped = {} if budget is None else parse_budget(budget)
            try:
                config = make_config(name, {**settings, **chosen, **capped})
            except ConfigError as error:
                raise ConfigError(f"policy {name!r}: {error}") from error
            curve = label or describe(config, without=tuple(capped))
            if label and chosen:
                curve = " ".join([label, *(f"{key}={_text(value)}" for key, value in chosen.items())])
            cell = Cell(config, rows[0], curve, str(entry.get("group", "policies")), entry.get("problems"))
            packed = [int(entry["pack"])] if entry["pack"] and not cell.coupled else rows
            cells += [replace(cell, batch=batch) for batch in packed]
    return cells


def _positive(values: Sequence[int], what: str) -> list[int]:
    for value in values:
        if not isinstance(value, int) or value < 1:
            raise InputError(f"{value!r} is not a {what}: it must be a whole number from 1 on")
    if not values:
        raise InputError(f"no {what} is given")
    return list(values)


def check_layers(cells: Sequence[Cell], layers: int | None) -> None:
    """Refuse budgets that a model of so many layers cannot be served with, before it is loaded; None: not known.

    Budgets in bytes wait for the model, which alone knows what a token takes.

    Raises:
        ConfigError: names the cell.
    """
    for cell in cells if layers else ():
        if isinstance(cell.config.budget, str):
            continue
        try:
            make_policy(cell.config).begin(layers or 0, 1)
        except ConfigError as error:
            raise ConfigError(f"{cell.id}: {error}") from error
