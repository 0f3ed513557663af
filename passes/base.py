"""What a pass is, and the runner that checks the graph after every one.

A pass is a frozen dataclass whose fields are its options; its docstring states the rewrite as *before => after*, and
`run` returns the program with what it matched and what it refused, each refusal with its reason.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol

from torch import fx

from lethe_compile.errors import UnsupportedGraphError, VerificationError
from lethe_compile.passes.check import check
from lethe_compile.passes.program import Program, source_of


@dataclass(frozen=True)
class Note:
    """One thing that a pass did, or declined to do: at which node, to which layer, and what or why."""

    node: str
    text: str
    layer: int | None = None


@dataclass(frozen=True)
class PassResult:
    program: Program
    matches: tuple[Note, ...] = ()
    refusals: tuple[Note, ...] = ()


class Pass(Protocol):
    """A rewrite of the graph. `name` stands in reports, dumps and errors."""

    name: ClassVar[str]

    def run(self, program: Program) -> PassResult:
        """Rewrite `program.module` in place and return it with what is now known about it."""
        ...


@dataclass(frozen=True)
class PassRecord:
    """What the report keeps of a pass."""

    name: str
    matches: tuple[Note, ...]
    refusals: tuple[Note, ...]
    nodes: int  # in the graph after it


@dataclass
class PipelineResult:
    program: Program
    records: list[PassRecord] = field(default_factory=list)


def run_pipeline(
    program: Program, passes: Sequence[Pass], observe: Callable[[str, Program], None] | None = None
) -> PipelineResult:
    """Run `passes` in order, verifying the graph after each; `observe` is called with each pass's name and its result.

    With the environment variable LETHE_DUMP=dir, the graph after each pass is written there as text and for GraphViz.

    Raises:
        UnsupportedGraphError: a pass met what it cannot rewrite correctly.
        VerificationError: a pass left a broken graph; names it, those before it, and the node.
    """
    result = PipelineResult(program)
    for index, step in enumerate(passes):
        outcome = step.run(result.program)
        result.program = outcome.program
        try:
            check(result.program)
        except VerificationError as error:
            earlier = [p.name for p in passes[:index]]
            raise VerificationError(error.reason, pass_name=step.name, earlier=earlier, node=error.node) from error
        nodes = len(result.program.graph.nodes)
        result.records.append(PassRecord(step.name, outcome.matches, outcome.refusals, nodes))
        if folder := os.environ.get("LETHE_DUMP"):
            dump(result.program.graph, Path(folder) / f"{index:02d}-{step.name}")
        if observe is not None:
            observe(step.name, result.program)
    return result


def dump(graph: fx.Graph, path: Path) -> None:
    """Write a graph as text to `path`.txt, and for GraphViz to `path`.dot."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".txt").write_text(f"{graph}\n")
    nodes = [f'  "{node.name}" [label="{node.name}\\n{node.target}"]' for node in graph.nodes]
    edges = [f'  "{source.name}" -> "{node.name}"' for node in graph.nodes for source in node.all_input_nodes]
    path.with_suffix(".dot").write_text("\n".join(["digraph {", "  node [shape=box]", *nodes, *edges, "}", ""]))


def refuse(reason: str, program: Program, layer: int, hint: str | None = None) -> UnsupportedGraphError:
    """The error for a site that cannot be rewritten, with its layer, node and source."""
    site = program.sites[layer]
    where = ", ".join(dict.fromkeys(part for part in (site.name, source_of(site.node)) if part))
    return UnsupportedGraphError(reason, layer=layer, node=site.node.name, where=where, hint=hint)
