"""Drawings as SVG and for GraphViz.

The SVG is laid out here, so that it looks the same everywhere: boxes in rows by their distance from the inputs, arrows
to the next row straight, and longer ones on rails at the right, one rail for all arrows of a box.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from lethe_compile.passes.drawing import Box, Drawing

_CHARACTER, _LINE, _PAD = 6.7, 15, 9  # of the monospaced font; pixels
_GAP_X, _GAP_Y, _RAIL = 18, 26, 12
_MOST = 58  # characters of a line
STYLE = """
.lg{--lg-fg:#1f2933;--lg-dim:#5b6770;--lg-line:#8a97a3;--lg-box:#eef1f4;--lg-edge:#c3ccd4;--lg-attn:#ffe1c7;
--lg-attn-edge:#d55e00;--lg-state:#d9f0e6;--lg-state-edge:#009e73;--lg-io:#dcebf8;--lg-io-edge:#0072b2}
@media (prefers-color-scheme:dark){.lg{--lg-fg:#e6eaee;--lg-dim:#a3afba;--lg-line:#718090;--lg-box:#232b33;
--lg-edge:#47535e;--lg-attn:#4a2a12;--lg-attn-edge:#ff9a4d;--lg-state:#123a2e;--lg-state-edge:#3fcf9f;--lg-io:#12314a;
--lg-io-edge:#6bb5ea}}
.lg text{font:11px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;fill:var(--lg-fg)}
.lg .lg-d{fill:var(--lg-dim)}
.lg rect{fill:var(--lg-box);stroke:var(--lg-edge)}
.lg .lg-attention rect{fill:var(--lg-attn);stroke:var(--lg-attn-edge);stroke-width:1.5}
.lg .lg-state rect,.lg .lg-cache rect{fill:var(--lg-state);stroke:var(--lg-state-edge)}
.lg .lg-input rect,.lg .lg-output rect{fill:var(--lg-io);stroke:var(--lg-io-edge)}
.lg path{fill:none;stroke:var(--lg-line);stroke-width:1.1}
.lg .lg-h{fill:var(--lg-line);stroke:none}
"""


@dataclass
class _Placed:
    box: Box
    lines: list[tuple[str, str]]  # (class, text)
    width: float
    x: float = 0.0
    y: float = 0.0

    @property
    def height(self) -> float:
        return 2 * _PAD - 5 + _LINE * len(self.lines)


def to_svg(drawing: Drawing, title: str, *, style: bool = True) -> str:
    """The drawing as an SVG element that stands alone, or, without `style`, in a page that has `STYLE`."""
    placed = {box.id: _placed(box) for box in drawing.boxes}
    rows = _rows(drawing)
    width = max((sum(placed[i].width + _GAP_X for i in row) for row in rows), default=0.0) + _GAP_X
    y = float(_GAP_Y)
    for row in rows:
        x = (width - sum(placed[i].width + _GAP_X for i in row) + _GAP_X) / 2
        for name in row:
            placed[name].x, placed[name].y = x, y
            x += placed[name].width + _GAP_X
        y += max(placed[i].height for i in row) + _GAP_Y
    level = {name: depth for depth, row in enumerate(rows) for name in row}
    straight = [(a, b) for a, b in drawing.arrows if level[b] == level[a] + 1]
    railed = [arrow for arrow in drawing.arrows if arrow not in set(straight)]
    rails, lanes = _rails(railed, placed, width)
    parts = [_straight(placed[a], placed[b]) for a, b in straight] + rails
    parts += [_box(each) for each in placed.values()]
    width += lanes * _RAIL + _GAP_X
    css = f"<style>{STYLE}</style>" if style else ""
    label = escape(title)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="lg" role="img" aria-label="{label}" '
        f'viewBox="0 0 {width:.0f} {y:.0f}" width="{width:.0f}" height="{y:.0f}">{css}<title>{label}</title>'
        f"{''.join(parts)}</svg>\n"
    )


def to_dot(drawing: Drawing) -> str:
    """The drawing for GraphViz."""
    colours = {"attention": "#ffe1c7", "state": "#d9f0e6", "cache": "#d9f0e6", "input": "#dcebf8", "output": "#dcebf8"}
    lines = ["digraph {", '  node [shape=box, style=filled, fontname="monospace", fontsize=10]']
    for index, layer in enumerate(dict.fromkeys(box.layer for box in drawing.boxes)):
        lines += [f"  subgraph cluster_{index} {{", f"    label={_quoted(layer)}"] if layer else []
        for box in (box for box in drawing.boxes if box.layer == layer):
            label = _quoted(f"{box.label}\n{box.detail}" if box.detail else box.label)
            lines.append(f"  {_quoted(box.id)} [label={label}, fillcolor={_quoted(colours.get(box.kind, '#eef1f4'))}]")
        lines += ["  }"] if layer else []
    lines += [f"  {_quoted(source)} -> {_quoted(target)}" for source, target in drawing.arrows]
    return "\n".join([*lines, "}", ""])


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def _placed(box: Box) -> _Placed:
    lines = [("", box.label)]
    if box.nodes > 1:
        lines[0] = ("", f"{box.label}  ·  {box.nodes} nodes")
    lines += [("lg-d", box.detail)] if box.detail else []
    longest = max(min(len(text), _MOST) for _, text in lines)
    return _Placed(box, lines, longest * _CHARACTER + 2 * _PAD)


def _rows(drawing: Drawing) -> list[list[str]]:
    """Ids by level: one more than the deepest box before it in the order of execution."""
    order = {box.id: index for index, box in enumerate(drawing.boxes)}
    before: dict[str, list[str]] = {name: [] for name in order}
    for source, target in drawing.arrows:
        if order[source] < order[target]:
            before[target].append(source)
    level: dict[str, int] = {}
    for name in order:
        level[name] = max((level[source] + 1 for source in before[name]), default=0)
    rows: list[list[str]] = [[] for _ in range(max(level.values(), default=-1) + 1)]
    for name, depth in level.items():
        rows[depth].append(name)
    return rows


def _rails(arrows: Sequence[tuple[str, str]], placed: dict[str, _Placed], left: float) -> tuple[list[str], int]:
    """Arrows that pass a row, on rails right of `left`; each box has one rail, and rails that do not meet share it."""
    targets: dict[str, list[str]] = {}
    for source, target in arrows:
        targets.setdefault(source, []).append(target)
    taken: list[float] = []  # [lanes] down to where each is occupied
    parts = []
    for source in sorted(targets, key=lambda name: placed[name].y):
        one, ends = placed[source], [placed[name] for name in targets[source]]
        ys = [end.y + end.height / 2 - 4 for end in ends]
        start = one.y + one.height / 2 + 4
        top, bottom = min(start, *ys), max(start, *ys)
        lane = next((index for index, until in enumerate(taken) if until < top), len(taken))
        taken[lane : lane + 1] = [bottom]
        x = left + lane * _RAIL
        parts.append(f'<path d="M{one.x + one.width:.1f} {start:.1f}H{x:.1f}M{x:.1f} {top:.1f}V{bottom:.1f}"/>')
        for end, y in zip(ends, ys, strict=True):
            tip = end.x + end.width
            parts.append(f'<path d="M{x:.1f} {y:.1f}H{tip:.1f}"/>')
            parts.append(f'<path class="lg-h" d="M{tip:.1f} {y:.1f}l7 -3.5v7z"/>')
    return parts, len(taken)


def _straight(source: _Placed, target: _Placed) -> str:
    x, y = source.x + source.width / 2, source.y + source.height
    end_x, end_y = target.x + target.width / 2, target.y
    middle = (y + end_y) / 2
    curve = f"M{x:.1f} {y:.1f}C{x:.1f} {middle:.1f} {end_x:.1f} {middle:.1f} {end_x:.1f} {end_y - 5:.1f}"
    return f'<path d="{curve}"/><path class="lg-h" d="M{end_x:.1f} {end_y:.1f}l-3.5 -7h7z"/>'


def _box(placed: _Placed) -> str:
    box = placed.box
    whole = escape("\n".join(text for _, text in placed.lines))
    texts = "".join(
        f'<text class="{kind}" x="{placed.x + _PAD:.1f}" y="{placed.y + _PAD + 6 + _LINE * index:.1f}">'
        f"{escape(_short(text))}</text>"
        for index, (kind, text) in enumerate(placed.lines)
    )
    rect = (
        f'<rect x="{placed.x:.1f}" y="{placed.y:.1f}" width="{placed.width:.1f}" height="{placed.height:.1f}" rx="4"/>'
    )
    return f'<g class="lg-{box.kind}"><title>{whole}</title>{rect}{texts}</g>'


def _short(text: str) -> str:
    return text if len(text) <= _MOST else text[: _MOST - 1] + "…"
