"""What the summary says of a recording: tokens and bytes beside those of a full cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Course:
    """One sequence of a recording. Bytes are of keys and values of all layers, retained and with nothing evicted."""

    prompt: int
    tokens: int
    rounds: int  # that evicted something
    evicted: int  # tokens of layers; of KV heads where each keeps its own
    kv_mean: float
    full_mean: float
    kv_end: float
    full_end: float
    sparsity: float | None  # Hoyer's, mean over layers and rounds


def course(recording: Mapping[str, Any], sequence: int) -> Course | None:
    """Of a sequence; None where no round saw it. Between rounds a cache grows by a token a step."""
    heads = recording["heads"]
    rows = slice(sequence * heads, (sequence + 1) * heads)
    rounds = [one for one in recording["rounds"] if one["active"][sequence]]
    if not rounds:
        return None
    before = np.array([one["before"] for one in rounds], np.float64)[:, :, rows]  # [S, L, heads]
    after = np.array([one["after"] for one in rounds], np.float64)[:, :, rows]
    each = np.array([layer["token_bytes"] / layer["heads"] for layer in recording["layers"]])  # [L] of one head
    total = sum(layer["token_bytes"] for layer in recording["layers"])
    seen = np.array([one["seen"][sequence] for one in rounds], np.float64)
    held, grown = ((of.sum(2) * each).sum(1) for of in (after, before))  # [S]
    words = recording["sequences"][sequence]
    fed = len(words["tokens"]) - 1  # the last token is written, and never fed
    last = fed - seen[-1]  # steps after the last round
    heights = np.concatenate([(held[:-1] + grown[1:]) / 2, [held[-1] + last / 2 * total]])
    fulls = np.concatenate([(seen[:-1] + seen[1:]) / 2, [(seen[-1] + fed) / 2]]) * total
    steps = np.maximum(np.concatenate([np.diff(seen), [last]]), 0)
    weight = steps if steps.sum() else np.ones_like(steps)
    measured = [one["sparsity"] for one in rounds if one["sparsity"] is not None]
    known = np.array(measured, np.float64)[:, :, rows] if measured else np.full(1, np.nan)
    return Course(
        prompt=words["prompt"],
        tokens=len(words["tokens"]),
        rounds=int((before > after).any((1, 2)).sum()),
        evicted=int((before - after).sum()),
        kv_mean=float((heights * weight).sum() / weight.sum()),
        full_mean=float((fulls * weight).sum() / weight.sum()),
        kv_end=float(held[-1] + last * total),
        full_end=float(fed * total),
        sparsity=float(np.nanmean(known)) if np.isfinite(known).any() else None,
    )
