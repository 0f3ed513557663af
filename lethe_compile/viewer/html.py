"""Pieces of HTML. Whatever is not `Markup` is text, and is escaped."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any


class Markup(str):
    """HTML that is finished; it is put in as it is."""

    __slots__ = ()


def text(value: object) -> Markup:
    """A value as HTML: escaped, unless it is finished."""
    return value if isinstance(value, Markup) else Markup(escape(str(value)))


def tag(name: str, *content: object, **attributes: object) -> Markup:
    """An element. Attributes lose a trailing `_`, and `_` within them is `-`; those that are None are left out."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{given}>{join(content)}</{name}>")


def join(parts: Iterable[object]) -> Markup:
    """Pieces one after the other."""
    return Markup("".join(map(text, parts)))


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], numbers: Sequence[int] = ()) -> Markup:
    """A table, the columns `numbers` of it flush right; it scrolls by itself where it is too wide."""
    side = ["n" if index in numbers else None for index in range(len(columns))]
    head = tag("tr", *(tag("th", name, class_=kind, scope="col") for name, kind in zip(columns, side, strict=True)))
    body = [tag("tr", *(tag("td", cell, class_=kind) for cell, kind in zip(row, side, strict=True))) for row in rows]
    return tag("div", tag("table", tag("thead", head), tag("tbody", *body)), class_="scroll")


def card(name: str, value: str, note: str = "", kind: str = "") -> Markup:
    """One figure; `kind` "good" or "bad" colours it."""
    parts = [("name", name), ("value", value), *([("note", note)] if note else [])]
    return tag("div", *(tag("div", words, class_=part) for part, words in parts), class_=f"card {kind}".strip())


def section(name: str, title: str, about: str, *content: object) -> Markup:
    """A section with an anchor."""
    heading = tag("h2", title, id=f"{name}-title")
    return tag("section", heading, tag("p", about, class_="dim"), *content, id=name, aria_labelledby=f"{name}-title")


def chart(name: str, label: str, height: int) -> Markup:
    """Room for a chart, which a script fills."""
    return tag("div", id=name, class_="chart", role="img", aria_label=label, style=f"height:{height}px")


def data(name: str, values: Any) -> Markup:
    """Values for scripts. Nothing in them can end the element, whatever strings hold."""
    plain = json.dumps(values, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        plain = plain.replace(character, f"\\u{ord(character):04x}")
    return Markup(f'<script type="application/json" id="{escape(name)}">{plain}</script>')
