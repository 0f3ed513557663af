"""The sections of the report that show charts, the text, and the graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lethe_compile.passes.drawing import Drawing
from lethe_compile.passes.svg import to_svg
from lethe_compile.printing import bytes_text
from lethe_compile.viewer.html import Markup, chart, join, section, table, tag
from lethe_compile.viewer.sweeps import FULL


def frontier(sweep: Mapping[str, Any]) -> Markup:
    """Accuracy against bytes."""
    groups = list(dict.fromkeys(point["group"] for point in sweep["points"] if point["curve"] != FULL))
    options = [tag("option", group, value=group) for group in groups]
    pick = tag(
        "div", tag("label", "group of policies", tag("select", *options, id="frontier-group")), class_="controls"
    )
    rows = [
        (point["group"], point["label"], bytes_text(point["kv"]), f"{point['accuracy']:.1f}", _interval(point))
        for point in sweep["points"]
    ]
    columns = ("group", "policy", "KV cache, mean", "accuracy, %", "95% interval")
    listed = tag("details", tag("summary", "all figures"), table(columns, rows, numbers=(2, 3, 4)))
    about = "Accuracy with its 95% interval against the mean KV cache of a sequence. Further left and higher is better."
    label = "Accuracy over mean KV bytes of a sequence, one line for each policy"
    note = tag("p", ". ".join(part for part in (sweep["title"], sweep["note"]) if part), class_="sub")
    return section("frontier", "Accuracy and memory", about, note, pick, chart("frontier-chart", label, 440), listed)


def _interval(point: Mapping[str, Any]) -> str:
    return "" if point["low"] is None else f"{point['low']:.1f} – {point['high']:.1f}"


def over_time(recording: Mapping[str, Any]) -> Markup:
    """Retained tokens, sparsity, and bytes over decode steps."""
    about = (
        "What each layer retained after every round, and how its attention was spread: Hoyer sparsity is 0 where all "
        "tokens get as much, and 1 where one gets everything."
    )
    pick = tag(
        "div", _sequences(recording, "cache-sequence"), _heads(recording, "cache-head"), _unit(), class_="controls"
    )
    height = max(220, min(620, 90 + 22 * len(recording["layers"])))
    return section(
        "cache", "The cache over time", about, pick,
        tag("h3", "Retained tokens"), chart("retained", "Heat map: tokens retained, by layer and decode step", height),
        tag("h3", "Hoyer sparsity"), chart("sparsity", "Heat map: Hoyer sparsity, by layer and decode step", height),
        tag("h3", "KV cache of the sequence"), chart("bytes", "KV bytes over decode steps, pruned and full", 260),
    )  # fmt: skip


def rounds(recording: Mapping[str, Any]) -> Markup:
    """Budgets and the time line of rounds."""
    about = (
        "Of the sequence chosen above. Each layer finds its own budget: the bar is the mean of what it kept after its "
        "rounds, the whisker reaches from the least to the most, and the mark is the length from which on it is pruned "
        "next, if there is one."
    )
    height = max(240, min(620, 100 + 22 * len(recording["layers"])))
    return section(
        "rounds", "Budgets and rounds", about,
        tag("h3", "Budgets"), chart("budgets", "Tokens that each layer kept after its rounds", 300),
        tag("h3", "Rounds"), chart("timeline", "Rounds by layer and step; larger where more was evicted", height),
    )  # fmt: skip


def words(recording: Mapping[str, Any]) -> Markup:
    """The text with what was evicted."""
    layers = [tag("option", "all layers together", value="all")]
    layers += [
        tag("option", f"layer {layer['layer']}: {layer['name']}", value=index)
        for index, layer in enumerate(recording["layers"])
    ]
    step = tag("label", "round", tag("input", type="range", id="text-step", min=0, max=1, value=1), class_="wide")
    controls = tag(
        "div", _sequences(recording, "text-sequence"), tag("label", "layer", tag("select", *layers, id="text-layer")),
        _heads(recording, "text-head"), step, tag("button", "Play", id="text-play", type="button"), class_="controls",
    )  # fmt: skip
    legend = [
        ("p", "prompt"),
        ("k", "kept, the fuller by more layers"),
        ("g", "evicted"),
        ("g n", "evicted in this round"),
        ("l", "not yet written"),
    ]
    keys = [
        tag("span", tag("span", tag("span", "token", class_=kind), class_="text", aria_hidden="true"), f" {name}")
        for kind, name in legend
    ]
    about = (
        "The text as a layer sees it after a round: evicted tokens are struck out. Move the round with the slider or "
        "the arrow keys; point at a token, or walk through the text with the arrow keys, to see what became of it."
    )
    body = tag(
        "div", id="text-body", class_="text", tabindex="0", role="application", aria_label="The text, token by token"
    )
    return section(
        "text", "What was kept of the text", about, controls,
        tag("div", id="text-status", role="status", class_="dim"), body, tag("div", *keys, class_="legend"),
        tag("div", id="text-info", class_="info", aria_live="polite"),
    )  # fmt: skip


def _sequences(recording: Mapping[str, Any], name: str) -> Markup:
    shown = [
        (index, f"sequence {index}: {len(one['tokens']):,} tokens") for index, one in enumerate(recording["sequences"])
    ]
    options = [tag("option", title, value=index) for index, title in shown]
    return tag("label", "sequence", tag("select", *options, id=name))


def _heads(recording: Mapping[str, Any], name: str) -> Markup:
    if recording["heads"] == 1:
        return Markup()
    options = [tag("option", f"head {head}", value=head) for head in range(recording["heads"])]
    return tag("label", "KV head", tag("select", *options, id=name))


def _unit() -> Markup:
    options = [tag("option", "tokens", value="tokens"), tag("option", "share of all tokens", value="share")]
    return tag("label", "retained, as", tag("select", *options, id="cache-unit"))


def graph(inspection: Mapping[str, Any]) -> Markup:
    """The graph before and after, its attentions, passes and operators."""
    before, after = (inspection.get(name) for name in ("captured", "result"))
    tabs = [_drawn(title, facts["drawing"]) for title, facts in (("Before", before), ("After", after)) if facts]
    if inspection.get("layers"):
        tabs.append(("Attentions", _attentions(inspection["layers"])))
    tabs.append(("Passes", _passes(inspection["passes"])))
    if before and after:
        tabs.append(("Operators", _operators(before["summary"]["ops"], after["summary"]["ops"])))
    warning = []
    if refusal := inspection.get("refusal"):
        warning = [tag("div", f"Refused during {refusal['during']}: {refusal['message']}", class_="warn")]
    about = "The model as it was captured, and what the passes made of it."
    return section("graph", "The graph before and after", about, *warning, tab_list("graph-tabs", tabs))


def _drawn(title: str, values: Mapping[str, Any]) -> tuple[str, Markup]:
    drawing = Drawing.from_dict(values)
    svg = Markup(to_svg(drawing, f"The graph, {title.lower()}: {drawing.nodes} nodes", style=False))
    folded = "; what a layer computes between two attentions is one box" if drawing.folded else ""
    about = tag("p", f"{drawing.nodes:,} nodes{folded}", class_="sub")
    return title, join([about, tag("div", svg, class_="graph", tabindex="0", role="group", aria_label=title)])


def _attentions(layers: Sequence[Mapping[str, Any]]) -> Markup:
    rows = [
        (
            layer["layer"], tag("code", layer["name"]), layer["found_by"], f"{layer['heads']}/{layer['kv_heads']}",
            layer["k_dim"] if layer["k_dim"] == layer["v_dim"] else f"{layer['k_dim']}/{layer['v_dim']}",
            layer["mask"] + (f" {layer['window']}" if layer["window"] else ""), layer.get("mask_proof", ""),
            f"{layer['bytes_per_token']:,}" if layer["cache_of"] == layer["layer"] else f"layer {layer['cache_of']}'s",
        )
        for layer in layers
    ]  # fmt: skip
    columns = ("layer", "module", "found by", "heads", "head_dim", "mask", "proof", "B/token")
    return table(columns, rows, numbers=(0, 3, 4, 7))


def _passes(records: Sequence[Mapping[str, Any]]) -> Markup:
    rows = [
        (tag("code", record["name"]), record["nodes"], len(record["matches"]), _notes(record["refusals"]))
        for record in records
    ]
    return table(("pass", "nodes after", "matches", "refusals"), rows, numbers=(1, 2))


def _notes(notes: Sequence[Mapping[str, Any]]) -> object:
    return join([tag("div", f"{note['node']}: {note['text']}") for note in notes]) if notes else "none"


def _operators(before: Mapping[str, int], after: Mapping[str, int]) -> Markup:
    names = sorted({*before, *after}, key=lambda name: -abs(after.get(name, 0) - before.get(name, 0)))
    rows = [
        (tag("code", name), before.get(name, 0), after.get(name, 0), f"{after.get(name, 0) - before.get(name, 0):+d}")
        for name in names
    ]
    return table(("operator", "before", "after", "change"), rows, numbers=(1, 2, 3))


def tab_list(name: str, tabs: Sequence[tuple[str, Markup]]) -> Markup:
    """Tabs with their panels; a script switches them, and without one all are seen."""
    heads = [
        tag(
            "button", title, role="tab", type="button", id=f"{name}-{index}", aria_controls=f"{name}-{index}-panel",
            aria_selected="false" if index else "true", tabindex="-1" if index else "0",
        )
        for index, (title, _) in enumerate(tabs)
    ]  # fmt: skip
    panels = [
        tag("div", content, role="tabpanel", id=f"{name}-{index}-panel", aria_labelledby=f"{name}-{index}")
        for index, (_, content) in enumerate(tabs)
    ]
    return join([tag("div", *heads, role="tablist", id=name, aria_label="Views"), *panels])
