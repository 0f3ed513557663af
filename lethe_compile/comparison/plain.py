"""A comparison as plain data: JSON-ready, finite, and bounded however long the texts are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from math import isfinite
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from lethe_compile.comparison.result import Comparison, Forced, Free, PromptResult, Side

BUCKETS = 256
"""Points of a curve over steps, at most."""


def plain(comparison: Comparison) -> dict[str, Any]:
    """`Comparison.to_dict`, which says what is in it."""
    from lethe_compile.comparison.result import FORMAT

    baseline = comparison.baseline
    values = {
        "format": FORMAT,
        "passed": comparison.passed,
        "facts": comparison.facts,
        "metrics": [one.to_dict() for one in comparison.metrics],
        "by_step": _by_step([one.forced for one in comparison.prompts if one.forced is not None]),
        "prompts": [_prompt(one) for one in comparison.prompts],
        "graph": None if comparison.graph is None else comparison.graph.to_dict(),
        "baseline": None if baseline is None else asdict(baseline),
        "failures": comparison.failures,
    }
    finite: dict[str, Any] = _finite(values)
    return finite


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null."""
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, (list, tuple)) else value


def _by_step(all_forced: Sequence[Forced]) -> dict[str, list[float]] | None:
    if not all_forced:
        return None
    longest = max(one.steps for one in all_forced)
    sums = np.zeros((3, longest))  # of KL, of agreement, and how many prompts got so far
    for one in all_forced:
        sums[:, : one.steps] += np.array([one.kl_of_step, one.top1_of_step, np.ones(one.steps)], np.float64)
    edges = _edges(longest)
    kl, top1, count = np.add.reduceat(sums, edges, axis=1)
    widest = np.maximum.reduceat(sums[2], edges)
    return {
        "step": edges.tolist(),
        "kl": (kl / count).tolist(),
        "top1": (top1 / count).tolist(),
        "prompts": widest.astype(int).tolist(),
    }


def _edges(steps: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """First steps of at most `BUCKETS` buckets of equally many steps, the last apart."""
    return np.arange(0, steps, -(-steps // BUCKETS))


def _prompt(one: PromptResult) -> dict[str, Any]:
    values: dict[str, Any] = {name: getattr(one, name) for name in ("id", "where", "prompt_tokens", "text")}
    values["forced"] = None if one.forced is None else _forced(one.forced)
    values["free"] = None if one.free is None else _free(one.free)
    return values


def _forced(one: Forced) -> dict[str, Any]:
    names = ("steps", "kl", "kl_max", "kl_max_step", "top1", "nll")
    edges = _edges(one.steps)
    sizes = np.diff([*edges, one.steps])
    kl = np.add.reduceat(np.asarray(one.kl_of_step, np.float64), edges) / sizes
    return {**{name: getattr(one, name) for name in names}, "kl_by_step": {"step": edges.tolist(), "kl": kl.tolist()}}


def _free(one: Free) -> dict[str, Any]:
    return {
        "first_divergence": one.first_divergence,
        "unpruned": _side(one.unpruned),
        "pruned": _side(one.pruned),
    }


def _side(one: Side) -> dict[str, Any]:
    names = ("terminated", "kv_mean", "kv_peak", "score", "answer")
    return {"new_tokens": len(one.tokens), **{name: getattr(one, name) for name in names}}
