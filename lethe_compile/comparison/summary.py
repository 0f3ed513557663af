"""From prompts to metrics: what the results of all prompts come to, and which prompt each metric is worst on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import exp
from statistics import fmean, median
from typing import TypeVar

import numpy as np

from lethe_compile.comparison.metrics import METRICS
from lethe_compile.comparison.result import Forced, Free, Measured, PromptResult, Side, Worst

R = TypeVar("R", Forced, Free)


def summarize(
    prompts: Sequence[PromptResult], seconds: tuple[float, float] | None, limits: Mapping[str, float]
) -> tuple[Measured, ...]:
    """All metrics that were measured, in the order of tables; `seconds` are those of both free-running generations."""
    forced = [(one, one.forced) for one in prompts if one.forced is not None]
    free = [(one, one.free) for one in prompts if one.free is not None]
    found = (_forced(forced) if forced else []) + (_free(free, seconds) if free else [])
    by_name = {one.metric.name: one for one in found}
    missing = [name for name in limits if name not in by_name]
    assert not missing, f"limits on what was not measured are refused before: {missing}"
    return tuple(_limited(by_name[name], limits.get(name)) for name in METRICS if name in by_name)


def _limited(one: Measured, limit: float | None) -> Measured:
    return Measured(one.metric, one.value, one.unpruned, one.pruned, one.worst, limit)


def _forced(rows: Sequence[tuple[PromptResult, Forced]]) -> list[Measured]:
    kl = np.concatenate([forced.kl_of_step for _, forced in rows])
    agreed = np.concatenate([forced.top1_of_step for _, forced in rows])
    steps = sum(forced.steps for _, forced in rows)
    nll = [sum(forced.nll[side] * forced.steps for _, forced in rows) / steps for side in (0, 1)]
    return [
        _measured("kl", float(kl.mean()), worst=_worst("kl", rows, lambda f: f.kl)),
        _measured("kl_p99", float(np.quantile(kl, 0.99, method="higher"))),
        _measured("kl_max", float(kl.max()), worst=_worst("kl_max", rows, lambda f: f.kl_max)),
        _measured("top1", float(agreed.mean()), worst=_worst("top1", rows, lambda f: f.top1)),
        _measured(
            "ppl_increase", _increase(nll[0], nll[1]), [_exp(nll[0]), _exp(nll[1])],
            _worst("ppl_increase", rows, lambda f: _increase(*f.nll)),
        ),
    ]  # fmt: skip


def _exp(value: float) -> float:
    return exp(min(value, 700.0))  # beyond, a float64 has no room


def _increase(unpruned: float, pruned: float) -> float:
    return _exp(pruned - unpruned) - 1


def _free(rows: Sequence[tuple[PromptResult, Free]], seconds: tuple[float, float] | None) -> list[Measured]:
    diverged = [free.first_divergence for _, free in rows if free.first_divergence is not None]
    tokens = [sum(len(side.tokens) for side in sides) for sides in _sides(rows)]
    ended = [fmean(side.terminated for side in sides) for sides in _sides(rows)]
    found = [
        _measured("same_outputs", 1 - len(diverged) / len(rows)),
        _measured(
            "length_ratio", tokens[1] / tokens[0], [count / len(rows) for count in tokens],
            _worst("length_ratio", rows, lambda f: len(f.pruned.tokens) / len(f.unpruned.tokens)),
        ),
        _measured("terminated_drop", ended[0] - ended[1], ended),
        *_bytes(rows),
    ]  # fmt: skip
    if diverged:
        earliest = [(one, free) for one, free in rows if free.first_divergence is not None]
        worst = _worst("first_divergence", earliest, lambda f: float(f.first_divergence or 0))
        found.append(_measured("first_divergence", float(median(diverged)), worst=worst))
    graded = [(one, free) for one, free in rows if free.unpruned.score is not None]
    if graded:
        scores = [fmean(side.score or 0.0 for side in sides) for sides in _sides(graded)]
        worst = _worst("accuracy_drop", graded, lambda f: (f.unpruned.score or 0.0) - (f.pruned.score or 0.0))
        found.append(_measured("accuracy_drop", scores[0] - scores[1], scores, worst))
    if seconds is not None:
        speed = [count / max(took, 1e-9) for count, took in zip(tokens, seconds, strict=True)]
        found.append(_measured("speedup", speed[1] / speed[0], speed))
    return found


def _bytes(rows: Sequence[tuple[PromptResult, Free]]) -> list[Measured]:
    mean = [fmean(side.kv_mean for side in sides) for sides in _sides(rows)]
    peak = [fmean(side.kv_peak for side in sides) for sides in _sides(rows)]

    def ratio(free: Free) -> float:
        return free.pruned.kv_mean / free.unpruned.kv_mean

    return [
        _measured("memory_saving", 1 - mean[1] / mean[0], mean, _worst("memory_saving", rows, lambda f: 1 - ratio(f))),
        _measured("kv_mean_ratio", mean[1] / mean[0], mean, _worst("kv_mean_ratio", rows, ratio)),
        _measured(
            "kv_peak_ratio", peak[1] / peak[0], peak,
            _worst("kv_peak_ratio", rows, lambda f: f.pruned.kv_peak / f.unpruned.kv_peak),
        ),
    ]  # fmt: skip


def _sides(rows: Sequence[tuple[PromptResult, Free]]) -> list[list[Side]]:
    return [[free.unpruned for _, free in rows], [free.pruned for _, free in rows]]


def _measured(
    name: str,
    value: float,
    both: Sequence[float] | None = None,
    worst: Worst | None = None,
) -> Measured:
    """`both` are the figures of the unpruned and of the pruned side."""
    unpruned, pruned = both or (None, None)
    return Measured(METRICS[name], value, unpruned, pruned, worst)


def _worst(name: str, rows: Sequence[tuple[PromptResult, R]], figure: Callable[[R], float]) -> Worst:
    """The first prompt with the worst figure."""
    sign = 1 if METRICS[name].lower_is_better else -1
    value, one = max(((figure(result), prompt) for prompt, result in rows), key=lambda pair: sign * pair[0])
    return Worst(one.id, one.where, value)
