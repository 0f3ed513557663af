"""`lethe inspect`: what the compiler finds in a model, rewrites, and refuses."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.highlighter import RegexHighlighter
from rich.text import Text
from rich.theme import Theme

from lethe_compile.config import LetheConfig
from lethe_compile.errors import InputError
from lethe_compile.inspection import inspect_model
from lethe_compile.passes import pipeline
from lethe_compile.passes.base import CAPTURED
from lethe_compile.passes.program import Program
from lethe_compile.passes.text import difference, graph_lines
from lethe_compile.tools import _models, _policies

ALL = "all"
REFUSED = 2
_STDOUT = Path("-")
_DIFF_STYLES = {"+++": "bold", "---": "bold", "@@": "cyan", "+": "green", "-": "red"}
_THEME = Theme({
    "graph.value": "cyan", "graph.type": "dim green", "graph.ours": "bold green", "graph.call": "yellow",
    "graph.module": "dim", "graph.keyword": "bold magenta",
})  # fmt: skip


class _GraphHighlighter(RegexHighlighter):
    base_style = "graph."
    highlights = (
        r"(?P<value>%\w+)",
        r"(?P<type>\b(?:f|bf|i|u)\d+\[[^\]]*\]|\bbool\[[^\]]*\])",
        r"= (?P<call>[\w.]+)\(",
        r"(?P<ours>lethe\.[\w.]+)",
        r"^(?P<keyword>input|return)\b",
        r"(?P<module>  # .*)$",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Capture a model, run the passes, print what they did; or check architectures. 2 for a model that is refused."""
    options = _arguments(argv)
    if options.matrix:
        from lethe_compile.tools import _matrix

        return _matrix.run(options.model, options.json, options.markdown, options.device)
    if len(options.model) != 1:
        raise InputError(f"name one model, not {len(options.model)}, or all architectures with --matrix")
    names = [step.name for step in pipeline(None, fuse=True, own_cache=True)]
    _check_known(options.print_after, [CAPTURED, *names])
    _check_known(options.diff, names)
    config = LetheConfig(policy=options.policy, policy_options=_policies.options_of(options.policy_option))
    quiet = options.json == _STDOUT
    console = Console(highlight=False, theme=_THEME, quiet=quiet)
    model = _models.load_model(options.model[0])
    watcher = _Watcher(console, options.print_after, options.diff)
    found = inspect_model(model, config, name=options.model[0], observe=watcher, dump_to=options.dump)
    console.print(found)
    if options.dump is not None and found.captured is not None:
        (options.dump / "inspection.json").write_text(found.to_json() + "\n")
        console.print(f"graphs before and after every pass: {options.dump}", style="dim", markup=False, soft_wrap=True)
    if quiet:
        print(found.to_json())
    elif options.json is not None:
        options.json.write_text(found.to_json() + "\n")
    return 0 if found.refusal is None else REFUSED


class _Watcher:
    """Prints graphs and their differences while the passes run."""

    def __init__(self, console: Console, printed: Sequence[str], differing: Sequence[str]) -> None:
        self._console, self._printed, self._differing = console, printed, differing
        self._before: list[str] = []

    def __call__(self, name: str, program: Program) -> None:
        if name == CAPTURED:
            self._check(program)
        lines = graph_lines(program) if self._printed or self._differing else []
        if _wanted(name, self._printed):
            title = "graph as it was captured" if name == CAPTURED else f"graph after {name}"
            self._console.rule(Text(f"{title}: {len(lines):,} nodes", style="bold"), align="left")
            self._console.print(*map(_highlighted, lines), sep="\n", soft_wrap=not self._console.is_terminal)
        if name != CAPTURED and _wanted(name, self._differing):
            self._show_difference(name, lines)
        self._before = lines

    def _show_difference(self, name: str, after: list[str]) -> None:
        changes = list(difference(self._before, after, name))
        added = sum(line.startswith("+") for line in changes[2:])
        removed = sum(line.startswith("-") for line in changes[2:])
        title = f"{name}: {added} lines added, {removed} removed" if changes else f"{name}: the graph is the same"
        self._console.rule(Text(title, style="bold"), align="left")
        for line in changes:
            style = next((style for start, style in _DIFF_STYLES.items() if line.startswith(start)), "dim")
            self._console.print(Text(line, style=style), soft_wrap=not self._console.is_terminal)

    def _check(self, program: Program) -> None:
        fuse, own_cache = program.device.type == "cuda", program.step is not None
        running = {ALL, CAPTURED, *(step.name for step in pipeline(None, fuse=fuse, own_cache=own_cache))}
        for name in [*self._printed, *self._differing]:
            if name not in running:
                raise InputError(
                    f"{name!r} does not run on this model: locate-cache is for steps that carry a cache,"
                    " fuse-projections for models on a GPU"
                )


def _highlighted(line: str) -> Text:
    text = Text(line)
    _GraphHighlighter().highlight(text)
    return text


def _wanted(name: str, asked: Sequence[str]) -> bool:
    return ALL in asked or name in asked


def _check_known(asked: Sequence[str], names: Sequence[str]) -> None:
    for name in asked:
        if name not in (*names, ALL):
            raise InputError(f"no pass is called {name!r}; there are {', '.join([*names, ALL])}")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="lethe inspect", description=__doc__)
    add = parser.add_argument
    add("model", nargs="*", metavar="MODEL", help=_models.HELP)
    _policies.add_arguments(parser.add_argument_group("pruning, which the graph is made for"))
    graphs = parser.add_argument_group("graphs; PASS is the name of a pass, or 'all', and may be given several times")
    graphs.add_argument(
        "--print-after", action="append", default=[], metavar="PASS",
        help=f"print the graph as it is after a pass; '{CAPTURED}' is the graph before the first",
    )  # fmt: skip
    graphs.add_argument(
        "--diff", action="append", default=[], metavar="PASS", help="print what a pass changed, as a diff"
    )
    graphs.add_argument(
        "--dump", type=Path, metavar="DIR", help="write the graph before and after every pass: text, .dot, SVG, JSON"
    )
    add("--json", type=Path, metavar="FILE", help="write everything as JSON; '-' prints it in place of tables")
    matrix = parser.add_argument_group("all architectures of transformers")
    matrix.add_argument("--matrix", action="store_true", help="check tiny models of the architectures named, or of all")
    matrix.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the matrix runs (default cpu)")
    matrix.add_argument("--markdown", type=Path, metavar="FILE", help="write the matrix as Markdown")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
