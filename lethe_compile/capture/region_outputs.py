"""What a torch.compile graph returns: logits, and beside them what needs nothing of the model and is run as it is."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from lethe_compile.errors import UnsupportedGraphError

WHOLE = "compile all of the model's forward: fullgraph=True says where a graph breaks"
_DROP_CACHE = (
    "pass use_cache=False, or a static cache, whose place the pruned one takes: generate(cache_implementation='static')"
)


@dataclass(frozen=True)
class Outputs:
    """The place of the logits, an example of them, and the graph of everything else that is returned or counted on.

    `made` are the places of a static cache's tensors that the graph allocates, as a prefill may, keys before values.
    """

    place: int
    example: Tensor
    rest: fx.GraphModule | None
    made: tuple[int, ...]

    def save_memory(self, windows: Collection[int | None]) -> None:
        """Allocate a static cache's layers no more, but those of `windows`, which transformers goes on to read."""
        if self.rest is None:
            return
        results: Any = self.rest.graph.output_node().args[0]
        for node in results:
            if _is_float(node, 4) and node.target is torch.zeros:
                slots = example_of(node).shape[2]
                if not isinstance(slots, int) or slots not in windows:  # a symbol is no window, and has no hash
                    node.target = unallocated
        self.rest.recompile()

    def join(self, logits: Tensor, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """All outputs in order, with `logits` in their place; counters among the inputs go on."""
        others = [] if self.rest is None else list(self.rest(*inputs))
        others.insert(self.place, logits.to(self.example.dtype))
        return tuple(others)


def _rest(graph: fx.GraphModule, computed: Mapping[fx.Node, None], results: Sequence[Any]) -> fx.GraphModule | None:
    """The part that computes `results`, and that advances integer counters in place; nothing of the model's."""
    counting = [n for n in graph.graph.nodes if n not in computed and _counts(n)]
    wanted = [r for r in results if isinstance(r, fx.Node)] + counting
    if not wanted:
        return None
    needed: set[fx.Node] = set()
    while wanted:
        node = wanted.pop()
        if node not in needed:
            needed.add(node)
            wanted += node.all_input_nodes
    part = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for node in graph.graph.nodes:
        if node.op == "placeholder" or node in needed:
            copied[node] = part.node_copy(node, copied.__getitem__)
    part.output(tuple(copied[r] if isinstance(r, fx.Node) else r for r in results))
    return fx.GraphModule(graph, part)


def _counts(node: fx.Node) -> bool:
    value = node.meta.get("example_value")
    in_place = node.op == "call_method" and str(node.target).endswith("_") and not str(node.target).endswith("__")
    return in_place and isinstance(value, Tensor) and not value.is_floating_point()


def _dependents(graph: fx.GraphModule, roots: Collection[fx.Node]) -> dict[fx.Node, None]:
    found: dict[fx.Node, None] = dict.fromkeys(roots)
    for node in graph.graph.nodes:
        if node.op != "output" and any(operand in found for operand in node.all_input_nodes):
            found[node] = None
    return found


def unallocated(size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of that shape without memory: every element is the same NaN, and writing to it fails."""
    return torch.full((), torch.nan, dtype=dtype, device=device).expand(size)


def _is_float(node: Any, rank: int) -> bool:
    value = example_of(node)
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() == rank


def outputs_of(graph: fx.GraphModule, weights: Collection[fx.Node]) -> Outputs:
    """What `graph` returns; `weights` are those of its inputs that are the model's own.

    Raises:
        UnsupportedGraphError: anything beside logits that depends on the model.
    """
    results: Sequence[Any] = graph.graph.output_node().args[0]  # type: ignore[assignment]
    computed = _dependents(graph, weights)
    heavy = [place for place, result in enumerate(results) if result in computed]
    if len(heavy) != 1 or not _is_float(results[heavy[0]], 3):
        shapes = ", ".join(str(list(example_of(results[place]).shape)) for place in heavy) or "nothing of the model's"
        raise UnsupportedGraphError(
            f"the compiled graph must return logits [batch, tokens, vocabulary] alone, and returns {shapes}",
            hint=f"{_DROP_CACHE}; no hidden states or attentions; and {WHOLE}",
        )
    (logits,) = heavy
    rest = [result for place, result in enumerate(results) if place != logits]
    made = tuple(place for place, result in enumerate(results) if place != logits and _is_float(result, 4))
    return Outputs(logits, example_of(results[logits]), _rest(graph, computed, rest), made)


def example_of(node: Any) -> Any:
    """A value as torch.compile saw it: sizes are symbols where they are dynamic."""
    return node.meta.get("example_value") if isinstance(node, fx.Node) else node
