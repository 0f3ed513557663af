"""What the compiler saw and made of a model: the graph before and after, every attention, every cache, each refusal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lethe_compile.capture import capture
from lethe_compile.capture.causality import causality_told
from lethe_compile.config import LetheConfig
from lethe_compile.errors import UnsupportedGraphError
from lethe_compile.executor import choose_backend, waits_for_host
from lethe_compile.passes import pipeline
from lethe_compile.passes.base import CAPTURED, PassRecord, run_pipeline
from lethe_compile.passes.drawing import Drawing, draw
from lethe_compile.passes.program import Program, attribute
from lethe_compile.passes.summary import GraphSummary
from lethe_compile.passes.text import sizes_named, type_text
from lethe_compile.policies import make_policy
from lethe_compile.printing import Printable, bytes_text, ranges, styled, table_of
from lethe_compile.report import LayerReport, Report, pass_table

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

_TIERS = {
    "interface": "tier 1, recorded at transformers' attention interface",
    "sdpa": "tier 2, a scaled_dot_product_attention of the graph",
    "softmax": "tier 2, read off the graph around its softmax",
}
_SHOWN = 8  # operators that are printed


@dataclass(frozen=True)
class GraphFacts:
    """A graph from outside: its signature, what it calls, and a drawing."""

    summary: GraphSummary
    inputs: dict[str, str]  # name: dtype and sizes
    outputs: list[str]
    own_cache: tuple[str, ...]  # what a decode step carries from one to the next, by the model's names
    weights: int  # numbers in parameters and buffers
    weight_bytes: int
    expected_attentions: int | None  # as often as the model was seen to attend
    drawing: Drawing

    @classmethod
    def of(cls, program: Program) -> GraphFacts:
        """Of the graph as it is now."""
        names = sizes_named(program)
        (output,) = program.graph.find_nodes(op="output")
        paths = {str(node.target) for node in program.graph.find_nodes(op="get_attr")}
        held = [value for path in sorted(paths) if isinstance(value := attribute(program.module, path), torch.Tensor)]
        distinct = {(tensor.data_ptr(), tensor.shape): tensor for tensor in held}.values()
        step = program.step
        return cls(
            summary=GraphSummary.of(program.graph),
            inputs={str(node.target): type_text(node.meta.get("val"), names) for node in program.placeholders()},
            outputs=[type_text(node.meta.get("val"), names) for node in output.all_input_nodes],
            own_cache=() if step is None else tuple(state.name for state in step.states),
            weights=sum(tensor.numel() for tensor in distinct),
            weight_bytes=sum(tensor.numel() * tensor.element_size() for tensor in distinct),
            expected_attentions=program.expected_layers,
            drawing=draw(program),
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


@dataclass(frozen=True)
class Refusal:
    """Why a model cannot be compiled: the fields of `UnsupportedGraphError`, and the pass that raised it."""

    message: str
    reason: str
    during: str  # a pass, or "capture"
    layer: int | None
    node: str | None
    where: str | None
    hint: str | None

    @classmethod
    def of(cls, error: UnsupportedGraphError, during: str) -> Refusal:
        return cls(str(error), error.reason, during, error.layer, error.node, error.where, error.hint)


@dataclass(frozen=True)
class Inspection(Printable):
    """What was captured and what became of it; `report` and `result` are None where the model was refused."""

    model: str
    captured: GraphFacts | None
    passes: tuple[PassRecord, ...]
    result: GraphFacts | None
    report: Report | None
    refusal: Refusal | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: `Report.to_dict`, with model, captured, result and refusal beside it."""
        return {
            "model": self.model,
            "captured": None if self.captured is None else self.captured.to_dict(),
            "passes": [asdict(record) for record in self.passes],
            **({} if self.report is None else self.report.to_dict()),
            "result": None if self.result is None else self.result.to_dict(),
            "refusal": None if self.refusal is None else asdict(self.refusal),
        }

    def __rich__(self) -> RenderableType:
        from rich.console import Group

        parts: list[RenderableType] = [] if self.captured is None else self._captured_lines(self.captured)
        if self.report is None:
            parts += [pass_table(self.passes)] if self.passes else []
        else:
            parts += [self.report, *self._tier_lines(self.report.layers), self._cache_table(self.report.layers)]
        notes = [note for record in self.passes if record.name == "locate-cache" for note in record.matches]
        if notes:
            table = table_of("caches that the model carried itself, and lost", "layer", "what")
            for note in notes:
                table.add_row("" if note.layer is None else str(note.layer), note.text)
            parts.append(table)
        if self.captured is not None and self.result is not None:
            parts.append(self._operator_table(self.captured.summary.ops, self.result.summary.ops))
        return Group(*parts, self._verdict())

    def _captured_lines(self, facts: GraphFacts) -> list[RenderableType]:
        size = f"{facts.weights:,} weights, {bytes_text(facts.weight_bytes)}"
        expected = "" if facts.expected_attentions is None else f"; it attends {facts.expected_attentions} times"
        inputs = [f"{name} {kind}" for name, kind in facts.inputs.items()]
        lines: list[RenderableType] = [
            styled(
                ("captured ", "bold"), (self.model, "bold cyan"), f": {facts.drawing.nodes:,} nodes, {size}", expected
            ),
            styled(("  inputs ", "dim"), _some(inputs)),
            styled(("  output ", "dim"), _some(facts.outputs)),
        ]
        if facts.own_cache:
            lines.append(styled(("  own cache ", "dim"), _some(facts.own_cache)))
        return [*lines, ""]

    def _tier_lines(self, layers: Sequence[LayerReport]) -> list[Text]:
        found: dict[str, list[int]] = {}
        for layer in layers:
            found.setdefault(layer.found_by, []).append(layer.layer)
        return [
            styled("layers ", (ranges(numbers), "bold"), " found by ", (by, "magenta"), f": {_TIERS[by]}")
            for by, numbers in found.items()
        ]

    def _cache_table(self, layers: Sequence[LayerReport]) -> Table:
        """Layers whose caches are alike on one line."""
        alike: dict[tuple[Any, ...], list[LayerReport]] = {}
        for one in layers:
            shared = one.cache_of if one.cache_of != one.layer else None
            key = (one.pool, one.cached, one.keep_sets, one.kv_heads, one.bytes_per_token, shared)
            alike.setdefault(key, []).append(one)
        table = table_of("caches", "pool", "layers", "cache", "keep-sets", "B/token")
        for (pool, cached, sets, heads, size, shared), members in alike.items():
            sizes = f"{members[0].k_dim}" + ("" if cached == "latent" else f" + {members[0].v_dim}")
            held = f"{cached}, {heads} × {sizes}" if shared is None else f"that of layer {shared}"
            table.add_row(str(pool), ranges([one.layer for one in members]), held, str(sets), f"{size:,}")
        return table

    def _operator_table(self, before: Mapping[str, int], after: Mapping[str, int]) -> Table:
        table = table_of("operators that changed most", "what", "before", "after")
        names = {**before, **after}
        counts = {name: (before.get(name, 0), after.get(name, 0)) for name in names}
        changed = [name for name, (old, new) in counts.items() if old != new]
        changed.sort(key=lambda name: -abs(counts[name][1] - counts[name][0]))
        ours = [name for name in changed if name.startswith("lethe::")]
        rest = [name for name in changed if name not in ours]
        for name in [*ours, *rest[:_SHOWN]]:
            table.add_row(styled((name, "bold green" if name in ours else "")), *map(str, counts[name]))
        if len(rest) > _SHOWN:
            table.add_row(styled((f"and {len(rest) - _SHOWN} others", "dim")), "", "")
        return table

    def _verdict(self) -> Text:
        if self.refusal is None:
            count = 0 if self.report is None else len(self.report.layers)
            refused = sum(len(record.refusals) for record in self.passes)
            left = (
                f"{refused} sites were left as they are, see the refusals above" if refused else "nothing was refused"
            )
            return styled(("✓ ", "bold green"), f"all {count} attentions rewritten; {left}")
        return styled((f"✗ refused during {self.refusal.during}: ", "bold red"), self.refusal.message)


def _some(words: Sequence[str], most: int = 5) -> str:
    """The first few, and how many others."""
    left = len(words) - most
    return ", ".join(words) if left <= 1 else f"{', '.join(words[:most])} and {left} others"


def inspect_model(
    model: nn.Module | torch.export.ExportedProgram,
    config: LetheConfig | None = None,
    *,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    name: str = "",
    observe: Callable[[str, Program], None] | None = None,
    dump_to: Path | None = None,
) -> Inspection:
    """Capture a model, run the passes, and say what they did; nothing is compiled, run or verified against the model.

    Args:
        model, config, example_inputs: as of `optimize`.
        name: what to call the model.
        observe: called with "captured" and the captured graph, then with each pass's name and its result.
        dump_to: folder for the graph before and after every pass; see `passes.dump`.

    Returns:
        An `Inspection`; of a model that is refused, up to there, with the refusal.

    Raises:
        InputError: as of `optimize`.
    """
    config = config or LetheConfig()
    try:
        captured = capture(model, example_inputs)
    except UnsupportedGraphError as error:
        return Inspection(name, None, (), None, None, Refusal.of(error, "capture"))
    program, rule = captured.program, make_policy(config)
    before, records = GraphFacts.of(program), list[PassRecord]()
    if observe is not None:
        observe(CAPTURED, program)

    def done(record: PassRecord, after: Program) -> None:
        records.append(record)
        if observe is not None:
            observe(record.name, after)

    passes = pipeline(
        rule.decay, rule.peak, per_head=rule.per_head, fuse=program.device.type == "cuda",
        own_cache=program.step is not None, latent=config.cache_latent,
    )  # fmt: skip
    try:
        with causality_told(captured.original, program.device):
            program = run_pipeline(program, passes, done, dump_to=dump_to).program
    except UnsupportedGraphError as error:
        during = f"pass {passes[len(records)].name}"
        return Inspection(name, before, tuple(records), None, None, Refusal.of(error, during))
    return Inspection(name, before, tuple(records), GraphFacts.of(program), _report(program, records, config))


def _report(program: Program, records: Sequence[PassRecord], config: LetheConfig) -> Report:
    site, device = program.sites[0], program.device
    waits = waits_for_host(program.graph)
    backend = choose_backend("auto", device, stateful=bool(program.stateful), content=program.content, waits=waits)
    where = (site.node.meta["val"].dtype, device, backend, config.page_size_on(device.type))
    return Report.of(records, program.sites, program.stateful, config, *where)
