"""Accuracy against mean KV bytes, and what each layer retained over time; PNG and SVG by matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("agg")  # files only, whatever display there is

from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from lethe_compile.evaluation.cells import FULL
from lethe_compile.evaluation.figures import CellFigures, Figures
from lethe_compile.evaluation.journal import Record
from lethe_compile.evaluation.tables import human_bytes

# Okabe and Ito's palette, told apart by the colour-blind; black is the full cache. Markers say the same again.
_COLOURS = (
    "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7F7F7F", "#8C510A", "#332288", "#B8B000",
)  # fmt: skip
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
_STYLE: dict[Any, Any] = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "lethe"}


def pareto(figures: Figures, group: str, title: str, stem: Path) -> list[Path]:
    """Accuracy with 95% intervals against mean KV bytes of a sequence, a line a policy; returns the files."""
    cells = [cell for cell in figures.cells if cell.group == group and cell.policy != FULL]
    full = next((cell for cell in figures.cells if cell.policy == FULL), None)
    with mpl.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(7.6, 4.4), layout="constrained")
        for index, curve in enumerate(dict.fromkeys(cell.curve for cell in cells)):
            look: dict[str, Any] = {"color": _COLOURS[index % len(_COLOURS)], "marker": _MARKERS[index % len(_MARKERS)]}
            look["zorder"] = 4 - index / 100  # the first on top
            if index >= len(_COLOURS):
                look["linestyle"] = "--"
            _curve(axes, [cell for cell in cells if cell.curve == curve], curve, look)
        if full is not None:
            axes.axhspan(100 * full.score.low, 100 * full.score.high, color="black", alpha=0.08, lw=0)
            axes.axhline(100 * full.score.value, color="black", lw=0.8, ls=":")
            _curve(axes, [full], "full cache", {"color": "black", "marker": "h"})
        axes.set_xscale("log")
        _byte_axis(axes, [cell.kv_mean for cell in [*cells, *([full] if full else [])]])
        axes.set(xlabel="KV cache of one sequence, mean over its generation", ylabel="accuracy, %", title=title)
        axes.grid(alpha=0.25, lw=0.5)
        figure.legend(loc="outside right upper", frameon=False, fontsize=8)
        return _save(figure, stem)


def _curve(axes: Any, cells: Sequence[CellFigures], label: str, look: dict[str, Any]) -> None:
    points = sorted(cells, key=lambda cell: cell.kv_mean)
    score = np.array([100 * cell.score.value for cell in points])
    ends = np.array([[100 * cell.score.low, 100 * cell.score.high] for cell in points]).T
    spread = np.abs(np.array([score - ends[0], ends[1] - score])).clip(min=0)
    axes.errorbar(
        [cell.kv_mean for cell in points],
        score,
        yerr=spread,
        label=label,
        lw=1.3,
        ms=5,
        capsize=2,
        elinewidth=0.8,
        **look,
    )


def _byte_axis(axes: Any, values: Sequence[float]) -> None:
    """Powers of two, in their units, as many as have room."""
    low, high = np.log2(min(values)), np.log2(max(values))
    every = max(1, int(np.ceil((high - low) / 7)))
    axes.xaxis.set_major_locator(LogLocator(base=2.0**every, numticks=12))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: human_bytes(value)))
    axes.xaxis.set_minor_locator(NullLocator())
    margin = max(0.15, 0.05 * (high - low))
    axes.set_xlim(2 ** (low - margin - (low == high)), 2 ** (high + margin + (low == high)))


def heat_map(timeline: Record, title: str, stem: Path) -> list[Path]:
    """Retained tokens and Hoyer sparsity of each layer over decode steps, as in the paper's Figure 1."""
    retained = np.array(timeline["retained"], np.float64).T  # [layers, rounds]
    sparsity = np.array(timeline["sparsity"], np.float64).T
    measured = sparsity.size > 0 and bool(np.isfinite(sparsity).any())
    steps = timeline["steps"]
    edges = [*steps, steps[-1] + (steps[-1] - steps[-2] if len(steps) > 1 else 1)]
    panels: list[Any] = [(retained, "cividis", "retained tokens", None)]
    if measured:
        panels.append((sparsity, "viridis", "Hoyer sparsity", (0.0, 1.0)))
    height = min(6.0, max(1.7, 0.16 * len(retained) + 0.9))
    with mpl.rc_context(_STYLE):
        figure, rows = plt.subplots(
            len(panels), 1, figsize=(7.6, height * len(panels) + 0.5), sharex=True, squeeze=False, layout="constrained"
        )
        for axes, (values, colours, label, limits) in zip(rows[:, 0], panels, strict=True):
            low, high = limits or (0.0, float(np.nanmax(values)))
            layers = np.arange(len(values) + 1) - 0.5
            drawn = axes.pcolormesh(edges, layers, values, cmap=colours, vmin=low, vmax=high, rasterized=True)
            axes.set_facecolor("0.85")  # where nothing was measured
            figure.colorbar(drawn, ax=axes, label=label, pad=0.01)
            axes.set(ylabel="layer")
            axes.yaxis.get_major_locator().set_params(integer=True)
            axes.invert_yaxis()
        rows[-1, 0].set(xlabel="decode step")
        note = "" if measured else " (the policy keeps no scores: no sparsity)"
        figure.suptitle(title + note, fontsize=10)
        return _save(figure, stem)


def _save(figure: Any, stem: Path) -> list[Path]:
    files = [stem.with_name(stem.name + suffix) for suffix in (".png", ".svg")]
    for file in files:
        figure.savefig(file, dpi=150, metadata={"Date": None} if file.suffix == ".svg" else None)
    plt.close(figure)
    return files
