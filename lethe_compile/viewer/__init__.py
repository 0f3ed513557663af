"""The HTML report: one file that shows what pruning did, and needs no network.

Charts are Plotly's, whose script is inside the file. Its security policy lets a browser load nothing from elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.resources import files
from pathlib import Path
from typing import Any

import lethe_compile
from lethe_compile.errors import InputError, MissingPackageError
from lethe_compile.passes.svg import STYLE
from lethe_compile.recording import check_recording, read_recording
from lethe_compile.viewer import sections, summary
from lethe_compile.viewer.html import Markup, data, join, tag
from lethe_compile.viewer.sweeps import read_sweep

__all__ = ["write_report"]

_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
_SCRIPTS = ("common.js", "charts.js", "text.js")
_MOST = 3_000_000  # entries of evicted tokens that one file holds, about 15 MB


def write_report(
    path: str | Path,
    *,
    comparison: Mapping[str, Any] | None = None,
    recording: Mapping[str, Any] | str | Path | None = None,
    sweep: str | Path | None = None,
    graph: Mapping[str, Any] | None = None,
) -> Path:
    """Write the HTML report of whatever is given, in one file.

    Args:
        path: the file; its folder must exist.
        comparison: `Comparison.to_dict()` of `lethe compare`.
        recording: of a generation, see `lethe_compile.recording`; or the file that holds it.
        sweep: file of `lethe evaluate`, its `summary.json`, or one of `tools/results`.
        graph: `Inspection.to_dict()` of `lethe inspect`, or of `OptimizedModel.inspection`.

    Returns:
        `path`.

    Raises:
        InputError: nothing is given, or a file or value is not what it should be; says which and why.
        MissingPackageError: plotly is not installed.
    """
    parts: dict[str, Any] = {}
    if comparison is not None:
        parts["comparison"] = comparison
    if recording is not None:
        if isinstance(recording, (str, Path)):
            recording = read_recording(Path(recording))
        check_recording(recording)
        parts["recording"] = recording
    if sweep is not None:
        parts["sweep"] = read_sweep(Path(sweep))
    if graph is not None:
        parts["graph"] = graph
    if not parts:
        raise InputError("a report of nothing: give a comparison, a recording, a sweep or a graph")
    page = _page(parts)
    path = Path(path)
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(f"the report cannot be written to {path}: {error.strerror}") from error
    return path


def _page(parts: Mapping[str, Any]) -> str:
    recording, dropped = _fitting(parts["recording"]) if "recording" in parts else (None, 0)
    parts = {**parts, "recording": recording} if recording is not None else parts
    shown = _sections(parts)
    style = _asset("page.css") + STYLE
    scripts = join([Markup(f"<script>{source}</script>") for source in (_plotly(), *map(_asset, _SCRIPTS))])
    title = f"Lethe report: {_model(parts)}"
    notes = (
        [tag("div", f"{dropped} more sequences were recorded and do not fit in one file.", class_="warn")]
        if dropped
        else []
    )
    links = [tag("li", tag("a", name, href=f"#{anchor}")) for anchor, name, _ in shown]
    head = join([
        Markup('<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'),
        Markup('<meta name="color-scheme" content="light dark">'),
        tag("title", title),
        Markup(f"<style>{style}</style>"),
    ])  # fmt: skip
    body = join([
        tag("header", tag("h1", title), tag("div", _facts(parts), class_="sub"), class_="top"),
        tag("nav", tag("ul", *links), aria_label="Sections"),
        tag("main", *notes, summary.cards(parts), *(content for _, _, content in shown), tag("footer", _foot())),
        tag("noscript", tag("div", "The charts and the text need JavaScript.", class_="warn")),
        data("data", _for_scripts(parts)),
        scripts,
    ])  # fmt: skip
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def _sections(parts: Mapping[str, Any]) -> list[tuple[str, str, Markup]]:
    """Anchor, short name and content of each section that there is something for."""
    found = []
    if "comparison" in parts:
        found.append(("comparison", "Comparison", summary.verdict(parts["comparison"])))
    if "sweep" in parts:
        found.append(("frontier", "Frontier", sections.frontier(parts["sweep"])))
    if "recording" in parts:
        found.append(("cache", "Cache", sections.over_time(parts["recording"])))
        found.append(("rounds", "Rounds", sections.rounds(parts["recording"])))
        found.append(("text", "Text", sections.words(parts["recording"])))
    if "graph" in parts:
        found.append(("graph", "Graph", sections.graph(parts["graph"])))
    return found


def _for_scripts(parts: Mapping[str, Any]) -> dict[str, Any]:
    comparison = parts.get("comparison")
    return {
        "recording": parts.get("recording"),
        "sweep": parts.get("sweep"),
        "by_step": None if comparison is None else comparison["by_step"],
    }


def _fitting(recording: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """As many sequences, from the first, as one file should hold, and how many are left out."""
    heads, layers = recording["heads"], len(recording["layers"])
    each = [len(one["tokens"]) * layers * heads * len(recording["segments"]) for one in recording["sequences"]]
    kept = max(1, sum(sum(each[: i + 1]) <= _MOST for i in range(len(each))))
    if kept == len(each):
        return dict(recording), 0
    rows = kept * heads
    cut = ("before", "after", "sparsity", "threshold")
    rounds = [
        {
            **one, "active": one["active"][:kept], "seen": one["seen"][:kept],
            **{name: None if one[name] is None else [of[:rows] for of in one[name]] for name in cut},
        }
        for one in recording["rounds"]
    ]  # fmt: skip
    segments = [{**one, "evicted": [of[:rows] for of in one["evicted"]]} for one in recording["segments"]]
    fitting = {**recording, "sequences": recording["sequences"][:kept], "rounds": rounds, "segments": segments}
    return fitting, len(each) - kept


def _model(parts: Mapping[str, Any]) -> str:
    names = [parts["comparison"]["facts"].get("model")] if "comparison" in parts else []
    names += [parts[name].get("model") for name in ("recording", "graph", "sweep") if name in parts]
    return next((str(name) for name in names if name), "pruned generation")


def _facts(parts: Mapping[str, Any]) -> Markup:
    config = (parts.get("recording") or parts.get("graph") or {}).get("config") or {}
    if "comparison" in parts:
        config = parts["comparison"]["facts"].get("config") or config
    set_ = {name: value for name, value in config.items() if value not in (None, {}, [])}
    words = [f"policy {set_.pop('policy', 'unknown')}"] if config else []
    if "graph" in parts and "backend" in parts["graph"]:
        words.append(f"{parts['graph']['dtype']} on {parts['graph']['device']}, backend {parts['graph']['backend']}")
    settings = tag("details", tag("summary", "settings"), tag("pre", json.dumps(set_, indent=1))) if set_ else Markup()
    return join([", ".join(words), settings])


def _foot() -> str:
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return f"Lethe Compile {lethe_compile.__version__}, {now}"


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise MissingPackageError("the report needs plotly: pip install 'lethe-compile[report]'", "plotly") from error
    return str(get_plotlyjs())


def _asset(name: str) -> str:
    return files("lethe_compile.viewer").joinpath(name).read_text(encoding="utf-8")
