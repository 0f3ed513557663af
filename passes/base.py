"""What a pass is, and the runner that checks the graph after every one.

A pass is a frozen dataclass whose fields are its options; its docstring states the rewrite as *before => after*, and
`run` returns the program with what it matched and what it refused, each refusal with its reason.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol

from lethe_compile.errors import UnsupportedGraphError, VerificationError
from lethe_compile.passes.check import check
from lethe_compile.passes.dump import dump
from lethe_compile.passes.program import Program, source_of

CAPTURED = "captured"
"""What the graph before the first pass is called in dumps and on command lines."""


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
    program: Program,
    passes: Sequence[Pass],
    observe: Callable[[PassRecord, Program], None] | None = None,
    *,
    dump_to: Path | None = None,
) -> PipelineResult:
    """Run `passes` in order, verifying the graph after each; `observe` is called with each pass's record and result.

    The graph as it was captured and after each pass is written to the folder `dump_to`, or else to that which the
    environment variable LETHE_DUMP names, if any: as text, for GraphViz, as SVG and as JSON; see `passes.dump`.

    Raises:
        UnsupportedGraphError: a pass met what it cannot rewrite correctly.
        VerificationError: a pass left a broken graph; names it, those before it, and the node.
    """
    result = PipelineResult(program)
    folder = dump_to or (Path(os.environ["LETHE_DUMP"]) if os.environ.get("LETHE_DUMP") else None)
    if folder is not None:
        dump(program, folder / f"00-{CAPTURED}")
    for index, step in enumerate(passes):
        outcome = step.run(result.program)
        result.program = outcome.program
        try:
            check(result.program)
        except VerificationError as error:
            earlier = [p.name for p in passes[:index]]
            raise VerificationError(error.reason, pass_name=step.name, earlier=earlier, node=error.node) from error
        nodes = len(result.program.graph.nodes)
        record = PassRecord(step.name, outcome.matches, outcome.refusals, nodes)
        result.records.append(record)
        if folder is not None:
            dump(result.program, folder / f"{index + 1:02d}-{step.name}", asdict(record))
        if observe is not None:
            observe(record, result.program)
    return result


def refuse(reason: str, program: Program, layer: int, hint: str | None = None) -> UnsupportedGraphError:
    """The error for a site that cannot be rewritten, with its layer, node and source."""
    site = program.sites[layer]
    where = ", ".join(dict.fromkeys(part for part in (site.name, source_of(site.node)) if part))
    return UnsupportedGraphError(reason, layer=layer, node=site.node.name, where=where, hint=hint)
