"""The cards on top, and the verdict of a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lethe_compile.printing import bytes_text
from lethe_compile.viewer.figures import Course, course
from lethe_compile.viewer.html import Markup, card, join, section, table, tag
from lethe_compile.viewer.sweeps import FULL

_FIRST = ("top1", "kl", "ppl_increase", "accuracy_drop", "memory_saving", "speedup")
_NEAR = 1.0  # points of accuracy that a sweep may lose to count as level with the full cache


def cards(parts: Mapping[str, Any]) -> Markup:
    """Of whatever there is: comparison, recording, sweep, graph."""
    found: list[Markup] = []
    if comparison := parts.get("comparison"):
        found += _of_comparison(comparison)
    if recording := parts.get("recording"):
        found += _of_recording(recording)
    if sweep := parts.get("sweep"):
        found += _of_sweep(sweep)
    if graph := parts.get("graph"):
        found += _of_graph(graph)
    return tag("div", *found, class_="cards", id="summary", role="group", aria_label="Summary")


def _of_comparison(comparison: Mapping[str, Any]) -> list[Markup]:
    passed = bool(comparison["passed"])
    limits = [metric for metric in comparison["metrics"] if metric["limit"] is not None]
    held = f"{sum(bool(metric['passed']) for metric in limits)} of {len(limits)} limits hold" if limits else "no limits"
    shown = [card("verdict", "pass" if passed else "fail", held, "good" if passed else "bad")]
    for metric in comparison["metrics"]:
        if metric["name"] in _FIRST:
            kind = "bad" if metric["passed"] is False else ""
            note = f"limit {_limit(metric)}" if metric["limit"] is not None else ""
            shown.append(card(metric["title"], show(metric, metric["value"]), note, kind))
    return shown


def _of_recording(recording: Mapping[str, Any]) -> list[Markup]:
    courses = [one for i in range(len(recording["sequences"])) if (one := course(recording, i)) is not None]
    if not courses:
        return []
    mean, full = (sum(getattr(one, name) for one in courses) for name in ("kv_mean", "full_mean"))
    end, full_end = (sum(getattr(one, name) for one in courses) for name in ("kv_end", "full_end"))
    tokens, prompts = (sum(getattr(one, name) for one in courses) for name in ("tokens", "prompt"))
    of = f"{len(courses)} sequences" if len(courses) > 1 else "one sequence"
    found = [
        card("KV cache, mean", percent(mean, full), f"{bytes_text(mean)} of {bytes_text(full)}"),
        card("KV cache, at the end", percent(end, full_end), f"{bytes_text(end)} of {bytes_text(full_end)}"),
        card("tokens", f"{tokens:,}", f"{prompts:,} of the prompt; {of}"),
        card(
            "rounds",
            f"{sum(one.rounds for one in courses):,}",
            f"{_evicted(recording, courses):,} tokens evicted, mean of layers",
        ),
    ]
    known = [one.sparsity for one in courses if one.sparsity is not None]
    if known:
        found.append(card("Hoyer sparsity", f"{sum(known) / len(known):.2f}", "mean of layers and rounds"))
    return found


def _evicted(recording: Mapping[str, Any], courses: Sequence[Course]) -> int:
    rows = sum(int(layer["heads"]) for layer in recording["layers"])
    return round(sum(one.evicted for one in courses) / rows)


def _of_sweep(sweep: Mapping[str, Any]) -> list[Markup]:
    points = sweep["points"]
    full = next((point for point in points if point["curve"] == FULL), None)
    if full is None:
        return []
    others = [p for p in points if p["curve"] != FULL]
    beside = [p for p in others if p["group"] == full["group"]] or others
    level = [p for p in beside if p["accuracy"] >= full["accuracy"] - _NEAR]
    found = [card("full cache", f"{full['accuracy']:.1f}%", f"{bytes_text(full['kv'])} a sequence, mean")]
    if level:
        best = min(level, key=lambda point: point["kv"])
        share = percent(best["kv"], full["kv"])
        found.append(card("least cache within a point", share, f"{best['accuracy']:.1f}%: {best['label']}", "good"))
    return found


def _of_graph(graph: Mapping[str, Any]) -> list[Markup]:
    if graph.get("refusal"):
        return [card("graph", "refused", graph["refusal"]["reason"], "bad")]
    layers, result = graph.get("layers", []), graph.get("result")
    before = graph["captured"]["drawing"]["nodes"] if graph.get("captured") else None
    after = result["drawing"]["nodes"] if result else None
    nodes = f"{before:,} nodes to {after:,}" if before is not None and after is not None else ""
    return [card("attentions rewritten", f"{len(layers)}", nodes)]


def percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f}%" if whole else "–"


def show(metric: Mapping[str, Any], value: float | None) -> str:
    """A metric of a comparison, in its unit."""
    if value is None:
        return "–"
    if metric["unit"] == "share":
        return f"{100 * value:.2f}%"
    if metric["unit"] == "ratio":
        return f"{value:.2f} ×"
    return f"{value:,.0f}" if metric["unit"] == "steps" else f"{value:.3g}"


def _behind(metric: Mapping[str, Any], value: float | None) -> str:
    """One of the two figures behind a metric, in its own unit."""
    if value is None:
        return ""
    if metric["name"] in ("memory_saving", "kv_mean_ratio", "kv_peak_ratio"):
        return bytes_text(value)
    if metric["name"] in ("accuracy_drop", "terminated_drop"):
        return f"{100 * value:.1f}%"
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def _limit(metric: Mapping[str, Any]) -> str:
    return f"{'≤' if metric['lower_is_better'] else '≥'} {show(metric, metric['limit'])}"


def verdict(comparison: Mapping[str, Any]) -> Markup:
    """The section of a comparison: every metric, what failed, and the prompts one by one."""
    rows = [
        (
            metric["title"],
            show(metric, metric["value"]),
            _behind(metric, metric["unpruned"]),
            _behind(metric, metric["pruned"]),
            _limit(metric) if metric["limit"] is not None else "",
            _badge(metric["passed"]),
            metric["worst"]["id"] if metric["worst"] else "",
        )
        for metric in comparison["metrics"]
    ]
    columns = ["metric", "value", "unpruned", "pruned", "limit", "", "worst prompt"]
    failures = [tag("div", line, class_="warn") for line in comparison["failures"]]
    parts: list[object] = [*failures, table(columns, rows, numbers=(1, 2, 3, 4))]
    if comparison["by_step"]:
        label = "KL divergence and top-1 agreement over the steps of a generation, means over prompts"
        parts.append(tag("div", id="by-step", class_="chart", role="img", aria_label=label, style="height:340px"))
    prompts = [_prompt_row(prompt) for prompt in comparison["prompts"]]
    columns = ["prompt", "text", "KL", "top-1", "diverges at", "new tokens", "KV, mean", "score"]
    listed = tag("summary", f"{len(prompts)} prompts, one by one")
    parts.append(tag("details", listed, table(columns, prompts, numbers=range(2, 8))))
    about = "The pruned graph beside the unpruned one on the same prompts: fed the same tokens, and left to itself."
    return section("comparison", "Pruned against unpruned", about, *parts)


def _badge(passed: bool | None) -> object:
    if passed is None:
        return ""
    return tag("span", "holds" if passed else "exceeded", class_=f"badge {'good' if passed else 'bad'}")


def _prompt_row(prompt: Mapping[str, Any]) -> list[object]:
    forced, free = prompt["forced"], prompt["free"]
    row: list[object] = [
        join([prompt["id"], " ", tag("span", prompt["where"], class_="dim")]),
        tag("code", prompt["text"]),
    ]
    row += [f"{forced['kl']:.3g}", f"{100 * forced['top1']:.1f}%"] if forced else ["", ""]
    if not free:
        return [*row, "", "", "", ""]
    sides = (free["unpruned"], free["pruned"])
    step = free["first_divergence"]
    row.append("never" if step is None else f"{step:,}")
    row.append(" → ".join(f"{side['new_tokens']:,}" for side in sides))
    row.append(" → ".join(bytes_text(side["kv_mean"]) for side in sides))
    row.append(" → ".join("–" if side["score"] is None else f"{side['score']:g}" for side in sides))
    return row
