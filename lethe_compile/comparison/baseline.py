"""A comparison recorded in a file, so that a later one can be held against it, metric by metric.

A metric has regressed when it is worse than the baseline by more than its tolerance. Tolerances are absolute for shares
(0.02 is two points), and relative for the rest. What is better is no regression; `--update-baseline` records it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lethe_compile.comparison.result import BaselineCheck, Comparison, Measured, Regression
from lethe_compile.errors import InputError
from lethe_compile.passes.summary import GraphChange

FORMAT = "lethe-baseline/1"
TOLERANCE = {
    "kl": 0.1,
    "kl_p99": 0.2,
    "kl_max": 0.5,
    "top1": 0.005,
    "ppl_increase": 0.005,
    "accuracy_drop": 0.02,
    "same_outputs": 0.1,
    "first_divergence": 0.2,
    "length_ratio": 0.05,
    "terminated_drop": 0.02,
    "memory_saving": 0.02,
    "kv_mean_ratio": 0.05,
    "kv_peak_ratio": 0.05,
    "speedup": 0.25,
}
"""By metric. Time is the noisiest: on a machine shared with others, a quarter is no surprise."""
_NATS = 1e-4  # nats that are never a regression: what another build of a matrix product may bring
_ENVIRONMENT = ("candidate", "config", "device", "machine", "dtype", "backend", "batch_size", "torch", "transformers")


@dataclass(frozen=True)
class Baseline:
    """What a file holds: facts of the comparison, values by metric, and the graph."""

    file: Path
    facts: Mapping[str, Any]
    values: Mapping[str, float]
    graph: Mapping[str, Any] | None


def write_baseline(comparison: Comparison, path: str | Path) -> None:
    """Record a comparison. Raises `InputError` where the file cannot be written."""
    plain = comparison.to_dict()
    values = {one["name"]: one["value"] for one in plain["metrics"]}
    recorded = {"format": FORMAT, "facts": plain["facts"], "values": values, "graph": _graph(comparison.graph)}
    try:
        Path(path).write_text(json.dumps(recorded, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"the baseline {path} cannot be written: {error.strerror}") from error


def read_baseline(path: Path, prompts: str) -> Baseline:
    """Read what `write_baseline` wrote; `prompts` is the digest of those to be compared.

    Raises:
        InputError: there is none, it is no baseline, or one of other prompts.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"there is no baseline {path}: record one with --update-baseline") from error
    except OSError as error:
        raise InputError(f"the baseline {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(
            f"the baseline {path} is not JSON ({error}): record it again with --update-baseline"
        ) from error
    form = values.get("format") if isinstance(values, dict) else None
    if form != FORMAT or not all(isinstance(values.get(key), dict) for key in ("facts", "values")):
        raise InputError(f"{path} is no baseline of format {FORMAT!r}: record it again with --update-baseline")
    if values["facts"].get("prompts_sha256") != prompts:
        raise InputError(
            f"the baseline {path} was recorded on other prompts: compare on those, or record it again with"
            " --update-baseline"
        )
    known = {name: float(value) for name, value in values["values"].items() if value is not None}
    return Baseline(path, values["facts"], known, values.get("graph"))


def check_baseline(comparison: Comparison, baseline: Baseline, tolerance: Mapping[str, float]) -> BaselineCheck:
    """What became worse since, by more than `tolerance`, whose defaults are `TOLERANCE`."""
    found = []
    for one in comparison.metrics:
        name = one.metric.name
        if name in baseline.values:
            allowed = tolerance.get(name, TOLERANCE[name])
            if _worse(one, baseline.values[name], allowed):
                found.append(Regression(name, one.metric.title, baseline.values[name], one.value, allowed))
    graph, notes = _graph_changes(baseline.graph, _graph(comparison.graph))
    notes = [*_environment(baseline.facts, comparison.facts), *notes]
    missing = [name for name in baseline.values if name not in {m.metric.name for m in comparison.metrics}]
    notes += [f"not measured now: {', '.join(missing)}"] if missing else []
    return BaselineCheck(str(baseline.file), (*found, *graph), tuple(notes), dict(baseline.values))


def _worse(now: Measured, before: float, tolerance: float) -> bool:
    metric = now.metric
    room = tolerance if metric.unit == "share" else tolerance * abs(before)
    if metric.unit == "nats":
        room = max(room, _NATS)
    change = now.value - before if metric.lower_is_better else before - now.value
    return not change <= room  # also where it is NaN


def _graph(change: GraphChange | None) -> dict[str, Any] | None:
    """What a baseline keeps of the graph that runs."""
    if change is None:
        return None
    after = change.after
    names = {"inputs": [one.name for one in after.inputs], "outputs": len(after.outputs)}
    return {"attention_layers": change.attention_layers, "ops": dict(after.ops), **names}


def _graph_changes(
    before: Mapping[str, Any] | None, now: Mapping[str, Any] | None
) -> tuple[list[Regression], list[str]]:
    """Layers and signature must be the same; counts of ops may change, and are told."""
    if before is None or now is None:
        return [], []
    titles = {
        "attention_layers": "attention layers",
        "inputs": "inputs of the graph",
        "outputs": "outputs of the graph",
    }
    changed = [
        Regression(name, title, str(before.get(name)), str(now[name]), None)
        for name, title in titles.items()
        if before.get(name) != now[name]
    ]
    old, new = before.get("ops", {}), now["ops"]
    counts = [f"{op} {old.get(op, 0)} → {new.get(op, 0)}" for op in (*new, *old) if old.get(op, 0) != new.get(op, 0)]
    return changed, [f"op counts changed: {', '.join(dict.fromkeys(counts))}"] if counts else []


def _environment(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} differs: {_changes(before.get(name), now.get(name))}"
        for name in _ENVIRONMENT
        if before.get(name) != now.get(name)
    ]


def _changes(before: Any, now: Any) -> str:
    """What changed, of two values or two mappings."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [key for key in (*now, *before) if before.get(key) != now.get(key)]
        return ", ".join(f"{key} {before.get(key)} → {now.get(key)}" for key in dict.fromkeys(keys))
    return f"{before} → {now}"
