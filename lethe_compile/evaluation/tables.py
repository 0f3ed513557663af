"""The figures as tables: on a terminal, and in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lethe_compile.evaluation.figures import CellFigures, Estimate, Figures
from lethe_compile.evaluation.workers import Failed

_WIDE = 110  # columns from which on everything has room


class _Column(NamedTuple):
    title: str
    cell: Callable[[CellFigures], str]
    narrow: bool = True  # shown on terminals of 80 columns too


_COLUMNS = (
    _Column("batch", lambda f: str(f.batch)),
    _Column("n", lambda f: str(f.problems), narrow=False),
    _Column("accuracy %\n[95% CI]", lambda f: f"{_percent(f.score.value)}\n{_interval(f.score)}"),
    _Column("− full", lambda f: _signed(f.versus_full)),
    _Column("p", lambda f: "" if f.p_value is None else _p_value(f.p_value), narrow=False),
    _Column("KV mean", lambda f: human_bytes(f.kv_mean)),
    _Column(": full", lambda f: "" if f.kv_of_full is None else f"{f.kv_of_full:.3f}"),
    _Column("KV peak", lambda f: human_bytes(f.kv_peak), narrow=False),
    _Column("pool\nmean", lambda f: human_bytes(f.pool_mean), narrow=False),
    _Column("tokens", lambda f: f"{f.new_tokens:,.0f}"),
    _Column("ended\n%", lambda f: _percent(f.terminated)),
    _Column("tok/s", lambda f: f"{f.tokens_per_s:,.0f}"),
)
LEGEND = (
    "Means over problems. KV: keys and values of retained tokens of one sequence, mean or peak over its generation; "
    "pool: of the pages they hold. − full: points, on the same problems; p: McNemar, exact. tok/s: of one process."
)


def terminal(figures: Figures, width: int) -> RenderableType:
    """A table for each group of cells, by mean bytes, then Lethe at equal bytes; fits in 80 columns and more."""
    parts: list[RenderableType] = []
    columns = [column for column in _COLUMNS if column.narrow or width >= _WIDE]
    for group, cells in _groups(figures):
        table = Table(title=group, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column("", overflow="fold", min_width=14)  # two lines, as the accuracy takes
        for column in columns:
            table.add_column(column.title, justify="right", no_wrap=True)
        for cell in cells:
            table.add_row(Text(_name(cell)), *(column.cell(cell) for column in columns))
        parts.append(table)
    parts.append(Text(LEGEND, "dim"))
    if rows := _equal_rows(figures):
        table = Table(title=_EQUAL, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        for title, justify in (("KV mean", "right"), ("cell", "left"), ("less", "left"), ("points [95% CI]", "right")):
            table.add_column(title, justify=justify, overflow="fold")  # type: ignore[arg-type]
        for row in rows:
            table.add_row(*map(Text, row))
        parts.append(table)
    return Group(*parts)


def markdown(figures: Figures, headline: str, failures: Sequence[Failed] = ()) -> str:
    """The same, with all columns, for a report."""
    lines = [headline, ""]
    for group, cells in _groups(figures):
        titles = ["", *(column.title.replace("\n", " ") for column in _COLUMNS)]
        lines += [f"### {group}", "", _row(titles), _row(["---", *["---:"] * len(_COLUMNS)])]
        table = ([_name(cell), *(column.cell(cell).replace("\n", " ") for column in _COLUMNS)] for cell in cells)
        lines += [*map(_row, table), ""]
    lines += [LEGEND, ""]
    if rows := _equal_rows(figures):
        lines += [
            f"### {_EQUAL}",
            "",
            _row(["KV mean", "cell", "less", "points [95% CI]"]),
            _row(["---:"] + ["---"] * 3),
        ]
        lines += [_row(row) for row in rows] + [""]
    if failures:
        lines += ["### Failed", "", *(f"- {failed}" for failed in failures), ""]
    return "\n".join(lines)


_EQUAL = "at equal mean KV bytes, others interpolated between their cells"


def _groups(figures: Figures) -> Iterator[tuple[str, list[CellFigures]]]:
    for group in dict.fromkeys(cell.group for cell in figures.cells):
        cells = [cell for cell in figures.cells if cell.group == group]
        yield group, sorted(cells, key=lambda cell: -cell.kv_mean)


def _name(cell: CellFigures) -> str:
    return f"{cell.curve}, {cell.budget}" if cell.budget and cell.budget not in cell.curve else cell.curve


def _equal_rows(figures: Figures) -> list[list[str]]:
    names = {cell.id: _name(cell) for cell in figures.cells}
    return [
        [human_bytes(one.kv_mean), names[one.cell], one.curve, f"{_signed(one.difference)} {_interval(one.difference)}"]
        for one in figures.equal_bytes
        if one.difference is not None
    ]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _p_value(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else "<.001"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _signed(estimate: Estimate | None) -> str:
    return "" if estimate is None else f"{100 * estimate.value:+.1f}".replace("-", "−")


def _interval(estimate: Estimate) -> str:
    return f"[{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]".replace("-", "−")


def human_bytes(count: float) -> str:
    """Three digits and a unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1000 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.3g} {unit}"
