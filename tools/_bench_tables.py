"""Tables of the results, made from the JSON that a run writes, and the bar they are held against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lethe_compile.tools._bench_base import Row
from lethe_compile.tools._bench_sessions import LABELS

Cell = Callable[[Row], str]


def _number(key: str, form: str, unit: float = 1) -> Cell:
    """The figure under `key`, in units of `unit`; empty where the row has none."""

    def cell(row: Row) -> str:
        value = row.get(key)
        return "" if value is None else format(value if unit == 1 else value / unit, form)

    return cell


def _contestant(row: Row) -> str:
    name = str(row["contestant"])
    return LABELS.get(name, name)


_GIB = 2**30
_STEPS: dict[str, Cell] = {
    "batch\n×length": lambda row: f"{row['batch']}×{row['length']}",
    "": _contestant,
    "ms\n/step": _number("ms", ".2f"),
    "tok/s": _number("tokens_per_s", ",.0f"),
    "roof-\nline": _number("roofline_ms", ".2f"),
    "ratio": _number("of_roofline", ".2f"),
    "KV\nGiB": _number("kv_bytes", ".3g", _GIB),
    "peak\nGiB": _number("peak_bytes", ".1f", _GIB),
    "round\nms": _number("round_ms", ".1f"),
}
COLUMNS: dict[str, dict[str, Cell]] = {
    "kernels": {
        "rows\n×tokens": lambda row: f"{row['rows']}×{row['tokens']}",
        "heads": lambda row: f"{row['heads']}/{row['kv_heads']}",
        "": _contestant,
        "page": lambda row: str(row["page"] or ""),
        "µs": _number("us", ".1f"),
        "TB/s": _number("tb_per_s", ".2f"),
        "of\ncopy": _number("of_copy", ".0%"),
    },
    "steps": _STEPS,
    "cpu": _STEPS,
    "generate": {
        "": _contestant,
        "how": lambda row: str(row.get("how", "")),
        "s": _number("seconds", ",.1f"),
        "tok/s": _number("tokens_per_s", ",.0f"),
        "KV GiB": _number("kv_bytes", ".2f", _GIB),
        "rounds": _number("rounds_share", ".1%"),
    },
    "compile": {
        "shape": lambda row: str(row["shape"]),
        "layers": _number("layers", "d"),
        "": lambda row: str(row["start"]),
        "optimize\ns": _number("optimize_s", ".1f"),
        "first\ntoken s": _number("first_token_s", ".1f"),
        "second\ntoken s": _number("second_token_s", ".1f"),
    },
    "serving": {
        "at a\ntime": _number("concurrent", "d"),
        "": _contestant,
        "tok/s": _number("tokens_per_s", ",.0f"),
        "rows\n/step": _number("batch", ".1f"),
        "TTFT s\np50": _number("ttft_p50", ".2f"),
        "\np95": _number("ttft_p95", ".2f"),
        "TPOT ms\np50": _number("tpot_p50", ".1f", 1e-3),
        "\np95 ": _number("tpot_p95", ".1f", 1e-3),
        "KV\nGiB": _number("kv_peak", ".2f", _GIB),
        "pre-\nempted": _number("preemptions", "d"),
    },
    "memory": {
        "": _contestant,
        "sequences": _number("sequences", "d"),
        "tokens\neach": _number("tokens", ",d"),
        "steps\nrun": _number("steps", "d"),
        "tok/s": _number("tokens_per_s", ",.0f"),
        "pool\nGiB": _number("pool_bytes", ".2f", _GIB),
        "limit\nGiB": _number("budget_bytes", ".2f", _GIB),
    },
}
COLUMNS["tensor-parallel"] = {
    "ranks": _number("ranks", "d"),
    "batch\n×length": lambda row: f"{row['batch']}×{row['length']}" if "length" in row else f"{row['batch']}, generate",
    "": lambda row: _contestant(row) if "contestant" in row else "",
    "ms\n/step": _number("ms", ".2f"),
    "tok/s": _number("tokens_per_s", ",.0f"),
    "roof-\nline": _number("roofline_ms", ".2f"),
    "weights\nGiB": _number("weight_bytes", ".1f", _GIB),
    "KV\nGiB": _number("kv_bytes", ".3g", _GIB),
    "peak\nGiB": _number("peak_bytes", ".1f", _GIB),
    "round\nms": _number("round_ms", ".1f"),
    "reduce\nms": _number("reduce_ms", ".2f"),
    "of\ntime": _number("reduce_share", ".2%"),
}
_TITLES: dict[str, str] = {
    "kernels": "decode attention, median of interleaved repeats",
    "steps": "decode step",
    "cpu": "decode step on a CPU",
    "generate": "one batch generates",
    "compile": "start in a fresh process",
    "tensor-parallel": "decode step of one model on several ranks; memory of each rank",
    "memory": "largest batch in the same KV memory",
    "serving": "concurrent requests in the same KV memory",
}
_WORDS = {"", "shape", "how", "figure", "measured"}


def section(name: str, rows: Sequence[Row]) -> RenderableType:
    """The tables of one section, steps by shape; rows without figures name their reason below."""
    if COLUMNS[name] is not _STEPS:
        return _section(name, rows)
    shapes = dict.fromkeys(row["shape"] for row in rows)
    tables = (_section(name, [row for row in rows if row["shape"] == shape]) for shape in shapes)
    return Group(*tables, Text("ms/step: rounds shared out; ratio: a step without them, over its roofline", "dim"))


def _section(name: str, rows: Sequence[Row]) -> RenderableType:
    columns = COLUMNS[name]
    table = _table(_title(name, rows), list(columns))
    notes: list[Text] = []
    for row in rows:
        cells = [cell(row) for cell in columns.values()]
        if "error" in row:
            first = next((i for i, text in enumerate(cells) if not text), len(cells) - 1)
            notes.append(Text(f"[{len(notes) + 1}] {row['error']}"))
            cells[first] = f"\\[{len(notes)}]"
        table.add_row(*cells)
    return Group(table, *notes)


def _title(name: str, rows: Sequence[Row]) -> str:
    first = rows[0] if rows else {}
    if name == "generate" and rows:
        return f"{first['shape']}: {first['batch']} sequences generate {first['new_tokens']:,} tokens each"
    return f"{first['shape']}: {_TITLES[name]}" if COLUMNS[name] is _STEPS and rows else _TITLES[name]


def bandwidths(bandwidth: Row) -> str:
    """One line on what the device's memory gives."""
    copy, read = bandwidth["copy"] / 1e9, bandwidth["read"] / 1e9
    return f"memory: copy {copy:,.0f} GB/s (read + written), read {read:,.0f} GB/s"


def bar(figures: Sequence[Row]) -> RenderableType:
    """Figure, target, measured, and whether it is met."""
    table = _table("bar", ["figure", "target", "measured", "met"])
    for row in figures:
        met = {True: "[green]yes[/green]", False: "[red]no[/red]", None: "not measured"}[row["met"]]
        measured = "" if row["measured"] is None else format(row["measured"], row["form"])
        table.add_row(row["figure"], row["target"], f"{measured} {row['note']}".strip(), met)
    return table


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns:
        words: Any = "left" if column in _WORDS else "right"
        table.add_column(column, justify=words, overflow="fold", no_wrap=column not in _WORDS - {""})
    return table
