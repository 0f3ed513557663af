"""What prints in a terminal: values that rich renders as wide as it is, and the tables that they are made of."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

_STYLES = {"mask": "green", "found by": "magenta"}
_WORDS = ("pass", "name", "found by", "mask", "refusals", "cache", "what")


class Printable:
    """Renders with rich wherever it is printed; as text, 120 columns wide."""

    def __rich__(self) -> RenderableType:
        raise NotImplementedError

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(file=io.StringIO(), width=120, force_terminal=False)
        console.print(self)
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue().rstrip()

    def to_dict(self) -> dict[str, Any]:
        raise NotImplementedError

    def to_json(self, indent: int | None = 2) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=indent)


def table_of(title: str, *columns: str) -> Table:
    """An empty table; columns of words are on the left, numbers on the right."""
    from rich import box
    from rich.table import Table

    table = Table(
        title=title, title_justify="left", title_style="bold", header_style="bold cyan", box=box.SIMPLE_HEAD,
        collapse_padding=True, pad_edge=False,
    )  # fmt: skip
    for column in columns:
        words = column in _WORDS
        table.add_column(column, justify="left" if words else "right", overflow="fold", style=_STYLES.get(column))
    return table


def styled(*parts: str | tuple[str, str]) -> Text:
    """Text of parts, each plain or with a style."""
    from rich.text import Text

    return Text.assemble(*parts)


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as runs: ``0–4, 6, 8–9``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join("–".join(map(str, run)) for run in runs)


def bytes_text(count: float) -> str:
    """A size in the unit that suits it."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.2f} GiB"
