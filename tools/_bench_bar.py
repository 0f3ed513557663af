"""The figures that a run is held against, taken from its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from lethe_compile.tools import _bench_kernels as kernels
from lethe_compile.tools._bench_base import Row
from lethe_compile.tools._bench_sessions import DYNAMIC, FULL, LETHE

Sections = Mapping[str, Sequence[Row]]

_LARGE = 512 << 20  # bytes of keys and values from which a kernel is held against bandwidth
_SHAPE, _BATCH = "llama-8b", 16


def bar(sections: Sections, page: int) -> list[Row]:
    """One row a figure: "measured" and "met" are None where the run has no rows for it. `page`: page size, tokens."""
    return [
        _figure("attention with mass, of copy bandwidth", ">= 90%", ".0%", 0.9, _kernel_bandwidth(sections, page)),
        _figure("its time : torch flash SDPA, G=4", "<= 1.08", ".2f", 1.08, _against_sdpa(sections, page, 4), False),
        _figure("its time : torch flash SDPA, G=8", "<= 1.12", ".2f", 1.12, _against_sdpa(sections, page, 8), False),
        _figure("8B step, all of ~8k tokens : roofline", "<= 1.25", ".2f", 1.25, _step(sections, FULL), False),
        _figure("8B step, ~1k retained : roofline", "<= 1.25", ".2f", 1.25, _step(sections, LETHE), False),
        _figure("tok/s : ours unpruned", ">= 2.56", ".2f", 2.56, _ratio(sections, LETHE, FULL, "tokens_per_s")),
        _figure("KV memory, ours unpruned : Lethe", ">= 5", ".1f", 5, _ratio(sections, FULL, LETHE, "kv_bytes")),
        _figure("tok/s : HF DynamicCache", ">= 10", ".1f", 10, _ratio(sections, LETHE, DYNAMIC, "tokens_per_s")),
        _figure("rounds, of decode time", "<= 1.5%", ".2%", 0.015, _rounds(sections), False),
        _figure("cold optimize + first token", "<= 25 s", ".1f", 25, _start(sections, "cold"), False),
        _figure("warm optimize + first token", "<= 8 s", ".1f", 8, _start(sections, "warm"), False),
        _figure("16k sequences : unpruned, same memory", ">= 8", ".1f", 8, _sequences(sections)),
    ]


Found = tuple[float, str] | None
"""A measured value and what it is of, or nothing."""


def _figure(name: str, target: str, form: str, limit: float, found: Found, at_least: bool = True) -> Row:
    row: Row = {"figure": name, "target": target, "form": form, "measured": None, "note": "", "met": None}
    if found is None:
        return row
    value, note = found
    return {**row, "measured": value, "note": note, "met": value >= limit if at_least else value <= limit}


def _good(sections: Sections, section: str, **facts: object) -> list[Row]:
    """Rows with figures whose facts are as given."""
    rows = sections.get(section, ())
    return [row for row in rows if "error" not in row and all(row.get(key) == want for key, want in facts.items())]


def _shape(row: Row) -> str:
    return f"{row['rows']}×{row['tokens']}, {row['heads']}/{row['kv_heads']}"


def _worst(values: Iterable[tuple[float, str]], pick: Callable[[list[tuple[float, str]]], tuple[float, str]]) -> Found:
    found = list(values)
    if not found:
        return None
    value, of = pick(found)
    return value, f"(worst of {len(found)}: {of})"


def _kernel_bandwidth(sections: Sections, page: int) -> Found:
    rows = _good(sections, "kernels", contestant=kernels.OURS, page=page)
    return _worst(((row["of_copy"], _shape(row)) for row in rows if row["kv_bytes"] >= _LARGE), min)


def _against_sdpa(sections: Sections, page: int, group: int) -> Found:
    ours = _good(sections, "kernels", contestant=kernels.OURS, page=page, group=group)
    theirs = {_shape(row): row["us"] for row in _good(sections, "kernels", contestant=kernels.SDPA, group=group)}
    return _worst(((row["us"] / theirs[_shape(row)], _shape(row)) for row in ours if _shape(row) in theirs), max)


def _step(sections: Sections, contestant: str) -> Found:
    rows = _good(sections, "steps", shape=_SHAPE, batch=_BATCH, contestant=contestant)
    if not rows:
        return None
    longest = max(rows, key=lambda row: row["length"])
    return longest["of_roofline"], f"({longest['retained']:,.0f} tokens)"


def _ratio(sections: Sections, over: str, under: str, key: str) -> Found:
    above, below = _good(sections, "generate", contestant=over), _good(sections, "generate", contestant=under)
    if not above or not below:
        return None
    return above[0][key] / below[0][key], ""


def _rounds(sections: Sections) -> Found:
    """Of the long generation; else of the 8B steps."""
    rows = _good(sections, "generate", contestant=LETHE)
    rows = rows or _good(sections, "steps", shape=_SHAPE, batch=_BATCH, contestant=LETHE)
    return (rows[-1]["rounds_share"], f"({rows[-1]['round_ms']:.2f} ms each)") if rows else None


def _start(sections: Sections, start: str) -> Found:
    rows = _good(sections, "compile", start=start)
    return (rows[0]["ready_s"], f"({rows[0]['layers']} layers)") if rows else None


def _sequences(sections: Sections) -> Found:
    full, lethe = _good(sections, "memory", contestant=FULL), _good(sections, "memory", contestant=LETHE)
    if not full or not lethe or not lethe[0]["within_budget"]:
        return None
    return lethe[0]["sequences"] / full[0]["sequences"], f"({lethe[0]['sequences']} : {full[0]['sequences']})"
