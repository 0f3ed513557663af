"""What a report is made of, small: a recording of a real generation, an inspection, a sweep and a comparison."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HOSTILE = "</script><b>\"&'</title><img src=https://example.invalid/x>"


def sweep(path: Path) -> Path:
    """A file as `lethe evaluate` writes it."""

    def cell(curve: str, policy: str, group: str, kv: float, score: float) -> dict[str, Any]:
        ends = {"value": score, "low": max(0.0, score - 0.04), "high": min(1.0, score + 0.04)}
        return {
            "id": f"{curve}-{kv}", "curve": curve, "policy": policy, "group": group, "budget": f"max_tokens={kv:.0f}",
            "score": ends, "kv_mean": kv * 6144, "new_tokens": 2400.0, "terminated": 1.0,
        }  # fmt: skip

    cells = [cell("full", "full", "full", 1300, 0.998)]
    cells += [cell("lethe", "lethe", "policies", kv, score) for kv, score in ((160, 0.6), (230, 0.94), (380, 0.99))]
    cells += [cell(HOSTILE, "random", "policies", kv, score) for kv, score in ((160, 0.1), (230, 0.2), (380, 0.26))]
    cells += [cell("lethe decay=0.9", "lethe", "decay", 230, 0.7)]
    path.write_text(json.dumps({"model": "reasoner", "tasks": ["reasoner"], "problems": 96, "cells": cells}))
    return path


def comparison(passed: bool = False) -> dict[str, Any]:
    """As `Comparison.to_dict` says."""

    def metric(
        name: str, title: str, unit: str, value: float, limit: float | None = None, **more: Any
    ) -> dict[str, Any]:
        lower = name not in ("top1", "memory_saving", "speedup")
        holds = None if limit is None else value <= limit if lower else value >= limit
        values = {"value": value, "unpruned": None, "pruned": None, "limit": limit, "passed": holds, "worst": None}
        return {"name": name, "title": title, "unit": unit, "lower_is_better": lower, **values, **more}

    worst = {"id": HOSTILE, "where": "prompts.jsonl:3", "value": 0.9}
    steps = list(range(0, 256, 4))
    side = {"new_tokens": 200, "terminated": True, "kv_mean": 812000.0, "kv_peak": 1200000, "score": 1.0, "answer": "7"}
    prompt = {
        "id": HOSTILE, "where": "prompts.jsonl:3", "prompt_tokens": 12, "text": HOSTILE,
        "forced": {"steps": 256, "kl": 0.012, "kl_max": 0.9, "kl_max_step": 77, "top1": 0.98, "nll": [0.1, 0.11]},
        "free": {"first_divergence": None, "unpruned": side, "pruned": {**side, "score": None}},
    }  # fmt: skip
    return {
        "format": "lethe-comparison/1",
        "passed": passed,
        "facts": {"model": HOSTILE, "candidate": "pruned graph", "config": {"policy": "lethe", "max_tokens": 256}},
        "metrics": [
            metric("kl", "KL, mean per step", "nats", 0.012, 0.05, worst=worst),
            metric("top1", "top-1 agreement", "share", 0.981, 0.995, worst=worst),
            metric("memory_saving", "KV memory saved, mean", "share", 0.72, unpruned=812000.0, pruned=227000.0),
            metric("speedup", "tokens/s", "ratio", 1.81),
        ],
        "by_step": {
            "step": steps, "kl": [0.001 * (s % 17) for s in steps], "top1": [1 - 0.001 * (s % 11) for s in steps],
            "prompts": [3] * len(steps),
        },
        "prompts": [prompt, {**prompt, "id": "second", "forced": None}, {**prompt, "id": "third", "free": None}],
        "graph": None,
        "baseline": None,
        "failures": [] if passed else [f"top-1 agreement: 98.10%, limit ≥ 99.50% {HOSTILE}"],
    }  # fmt: skip
