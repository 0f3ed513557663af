"""A comparison on a terminal: verdict, metrics with their limits, the prompts that suffer most, the graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

from lethe_compile.comparison.result import Comparison, Measured, PromptResult
from lethe_compile.evaluation.tables import human_bytes

_WIDE = 100  # columns from which on everything has room
_PROMPTS = 5  # the worst that are shown
_OPS = 6


class Shown:
    """Renders as wide as the console is, from 60 columns on."""

    def __init__(self, comparison: Comparison) -> None:
        self._of = comparison

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        width = options.max_width
        yield self._head()
        yield self._metrics(width)
        if any(one.forced or one.free for one in self._of.prompts):
            yield self._prompts(width)
        if self._of.graph is not None:
            yield self._graph()
        if self._of.baseline is not None:
            yield from self._baseline()
        yield self._verdict()

    def _head(self) -> RenderableType:
        facts = self._of.facts
        number = facts["prompts"]
        line = Text()
        line.append(str(facts["model"]), "bold")
        line.append(f": {facts['candidate']}, policy {facts['config']['policy']}, beside the unpruned graph; ")
        line.append(f"{number} prompt{'' if number == 1 else 's'}, {facts['dtype']} on {facts['device']}, ")
        line.append(f"backend {facts['backend']}, {facts['seconds']:,.1f} s")
        return line

    def _metrics(self, width: int) -> RenderableType:
        wide = width >= _WIDE
        limited = any(one.limit is not None for one in self._of.metrics)
        table = _table("metrics", first="")
        for title in (("unpruned", "pruned") if wide else ()) + ("value",) + (("limit", "") if limited else ()):
            table.add_column(title, justify="right", no_wrap=True)
        table.add_column("worst prompt", overflow="ellipsis", no_wrap=True, ratio=1)
        for one in self._of.metrics:
            both = (_figure(one, one.unpruned), _figure(one, one.pruned)) if wide else ()
            verdict = (one.metric.show_limit(one.limit), _mark(one.passed)) if limited else ()
            value = Text(one.metric.show(one.value), "bold red" if one.passed is False else "")
            table.add_row(one.metric.title, *both, value, *verdict, _worst(one))
        return table

    def _prompts(self, width: int) -> RenderableType:
        wide = width >= _WIDE
        ordered = self._of.worst_first()
        shown = ordered[:_PROMPTS]
        rest = len(ordered) - len(shown)
        table = _table(f"prompts, worst first{f'; {rest} more are in --json' if rest else ''}", first="prompt")
        columns = ["tokens", *(["KL", "top-1"] if shown[0].forced else [])]
        if shown[0].free:
            columns += ["same\nuntil", "new\ntokens", *(["KV mean"] if wide else []), ": full", "answer"]
        for title in columns:
            table.add_column(title, justify="right", no_wrap=True)
        if wide:
            table.add_column("text", overflow="ellipsis", no_wrap=True, ratio=1)
        for one in shown:
            table.add_row(Text(one.id), *_prompt_cells(one, wide), *([Text(one.text, "dim")] if wide else []))
        return table

    def _graph(self) -> RenderableType:
        graph = self._of.graph
        assert graph is not None
        line = Text("graph: ", "bold")
        if graph.before is not None:
            line.append(f"{graph.before.nodes:,} nodes captured, ")
        line.append(f"{graph.after.nodes:,} run; {graph.attention_layers} attention layers; ")
        inputs = [one.name for one in graph.after.inputs]
        line.append(f"takes {', '.join(inputs[:3])}{f' and {len(inputs) - 3} more' if len(inputs) > 3 else ''}; ")
        ops = graph.after.ops
        shown = ", ".join(f"{count} {name.removeprefix('aten::')}" for name, count in list(ops.items())[:_OPS])
        line.append(f"calls {shown}{f' and {len(ops) - _OPS} other ops' if len(ops) > _OPS else ''}")
        for one in graph.unexpected:
            line.append(f"\nunexpected: {one}", "red")
        return line

    def _baseline(self) -> Iterator[RenderableType]:
        check = self._of.baseline
        assert check is not None
        worse = len(check.regressions)
        yield Text(f"baseline {check.file}: {f'{worse} regressed' if worse else 'nothing regressed'}", "bold")
        for one in check.regressions:
            yield Text(f"  regressed: {one}", "red")
        for note in check.notes:
            yield Text(f"  {note}", "dim")

    def _verdict(self) -> RenderableType:
        failures = self._of.failures
        if failures:
            return Text(
                "\n".join([f"FAILED: {len(failures)} of what was checked", *(f"  {one}" for one in failures)]), "red"
            )
        limits = sum(one.limit is not None for one in self._of.metrics)
        if not limits and self._of.baseline is None:
            return Text("no limits were given, and no baseline: nothing could fail but the graph", "yellow")
        kept = [f"{limits} limit{'' if limits == 1 else 's'} kept"] if limits else []
        kept += ["nothing regressed"] if self._of.baseline is not None else []
        return Text(f"passed: {', '.join(kept)}", "green")


def _table(title: str, first: str) -> Table:
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, expand=True
    )
    table.add_column(first, no_wrap=True, overflow="ellipsis", min_width=10)
    return table


def _figure(one: Measured, value: float | None) -> str:
    """One of the two figures behind a comparison, in its own unit."""
    if value is None:
        return ""
    if one.metric.name in ("memory_saving", "kv_mean_ratio", "kv_peak_ratio"):
        return human_bytes(value)
    if one.metric.name in ("accuracy_drop", "terminated_drop"):
        return f"{100 * value:.1f}%"
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def _mark(passed: bool | None) -> Text:
    return Text("" if passed is None else "✓" if passed else "✗", "green" if passed else "bold red")


def _worst(one: Measured) -> Text:
    if one.worst is None:
        return Text("")
    return Text(f"{one.metric.show(one.worst.value)}  {one.worst.id}", "dim")


def _prompt_cells(one: PromptResult, wide: bool) -> list[Any]:
    cells: list[Any] = [f"{one.prompt_tokens:,}"]
    if one.forced is not None:
        cells += [f"{one.forced.kl:.3g}", f"{100 * one.forced.top1:.2f}%"]
    if one.free is not None:
        left, right = one.free.unpruned, one.free.pruned
        step = one.free.first_divergence
        new = (
            f"{len(right.tokens):,}"
            if len(left.tokens) == len(right.tokens)
            else f"{len(left.tokens):,} → {len(right.tokens):,}"
        )
        cells += ["the end" if step is None else f"{step:,}", new]
        cells += [human_bytes(right.kv_mean)] if wide else []
        cells += [f"{right.kv_mean / left.kv_mean:.2f}", _answers(left.score, right.score)]
    return cells


def _answers(left: float | None, right: float | None) -> Text:
    if left is None or right is None:
        return Text("")
    words = {True: "right", False: "wrong"}
    if left in (0, 1) and right in (0, 1):
        text = words[bool(right)] if left == right else f"{words[bool(left)]} → {words[bool(right)]}"
    else:
        text = f"{left:.2f} → {right:.2f}"
    return Text(text, "red" if right < left else "")
