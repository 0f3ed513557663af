"""Decode steps that are modules: examples of their arguments; graphs of torch.compile, which take weights as inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from lethe_compile.capture.graph import ROLES, Captured, evaluating
from lethe_compile.capture.step import POSITIONS, STEP_POSITIONS, capture_step, is_step, root_of
from lethe_compile.errors import UnsupportedGraphError
from lethe_compile.passes.program import is_symbolic, written

PAST_LENGTH = "past_length"
_LEAST = "lethe_least_past"  # in the meta of a graph: the least `past_length` that its guards allow
# In the names that torch.compile gives to what a module owns.
_WEIGHT = ("L_self_", "_parameters_", "_buffers_", "_modules_")


def capture_step_module(model: nn.Module, names: Sequence[str], example: Mapping[str, Any] | None) -> Captured | None:
    """Capture `model` if it is a decode step, else None. It may be one where it has caches, or by its `example`.

    Raises:
        UnsupportedGraphError: torch cannot export it, or see `capture_step`.
    """
    if example is None:
        example = _example(model, names)
    elif not _may_be_of_step(tree_leaves(example)):
        return None
    if example is None:
        return None
    step = _flat(model) if isinstance(model, fx.GraphModule) else model
    exported = _export(step, example)
    if not is_step(exported):
        return None

    def call(**arguments: Any) -> Any:
        with evaluating(step):
            return step(**arguments)

    least = model.meta.get(_LEAST, 0) if isinstance(model, fx.GraphModule) else 0
    return capture_step(exported, call, step, least)


def _may_be_of_step(leaves: Sequence[Any]) -> bool:
    """Whether there are token ids, and more or other than whole sequences."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    plain = all(isinstance(leaf, (Tensor, int, float, type(None))) for leaf in leaves)
    whole = len(tensors) == len(leaves) and all(leaf.dim() == 2 and min(leaf.shape) > 1 for leaf in tensors)
    return plain and any(leaf.dim() == 2 for leaf in tensors) and not whole


def _flat(module: fx.GraphModule) -> fx.GraphModule:
    """The graph with its placeholders for arguments, each by its name."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    return fx.GraphModule(module, graph)


def _example(model: nn.Module, names: Sequence[str]) -> dict[str, Any] | None:
    """One token a row for a module with static caches among its buffers; None for any other."""
    caches = [b for b in model.buffers() if b.dim() == 4 and b.is_floating_point()]
    if not caches or not names:
        return None
    ids = torch.ones(len(caches[0]), 1, dtype=torch.int64, device=caches[0].device)
    example: dict[str, Any] = {names[0]: ids}
    for name in names[1:]:
        if name in ("input_pos", *STEP_POSITIONS):
            example[name] = torch.zeros(1, dtype=torch.int64, device=ids.device)
        elif name in ROLES["position_ids"]:
            example[name] = torch.zeros_like(ids)
    return example


def _export(model: nn.Module, example: Mapping[str, Any]) -> torch.export.ExportedProgram:
    """Export with every size dynamic that may be: more than one, and not of a cache that is written in place."""
    try:
        with evaluating(model), torch.no_grad():
            fixed = _of_fixed_size(model, example)
            shapes = _shapes(model, example, fixed)
            exported = torch.export.export(model, (), dict(example), dynamic_shapes=shapes, strict=False)
            inputs = _written_inputs(exported, tree_leaves(dict(example)))
            if any(all(leaf is not other for other in fixed) for leaf in inputs):
                shapes = _shapes(model, example, [*fixed, *inputs])
                exported = torch.export.export(model, (), dict(example), dynamic_shapes=shapes, strict=False)
    except UnsupportedGraphError:
        raise
    except Exception as error:  # torch.export raises many kinds; each means that there is no graph to work on
        raise UnsupportedGraphError(
            f"the model cannot be exported: {type(error).__name__}: {str(error).strip().splitlines()[0]}",
            hint="pass example_inputs of one decode step: token ids [rows, 1], positions, a past of 2 or more tokens",
        ) from error
    return exported


def _shapes(model: nn.Module, example: Mapping[str, Any], fixed: Sequence[Tensor]) -> Any:
    shapes = torch.export.ShapesCollection()
    for leaf in tree_leaves(dict(example)):
        if isinstance(leaf, Tensor) and not any(leaf is other for other in fixed):
            dynamic = {dim: torch.export.Dim.AUTO for dim, size in enumerate(leaf.shape[:3]) if size > 1}
            if dynamic:
                shapes[leaf] = dynamic
    named = shapes.dynamic_shapes(model, (), dict(example))
    dynamic_numbers = [n for n, v in example.items() if type(v) is int and n in POSITIONS]
    return {**named, **dict.fromkeys(dynamic_numbers, torch.export.Dim.AUTO)}


def _of_fixed_size(model: nn.Module, example: Mapping[str, Any]) -> list[Tensor]:
    """The arguments of a captured graph that have no dynamic size in it."""
    fixed = []
    for node in model.graph.nodes if isinstance(model, fx.GraphModule) else ():
        value, given = node.meta.get("example_value", node.meta.get("val")), example.get(str(node.target))
        if node.op == "placeholder" and isinstance(value, Tensor) and isinstance(given, Tensor):
            fixed += [] if any(is_symbolic(size) for size in value.shape) else [given]
    return fixed


def _written_inputs(exported: torch.export.ExportedProgram, leaves: Sequence[Any]) -> list[Tensor]:
    graph = exported.graph_module.graph
    names = list(exported.graph_signature.user_inputs)
    roots = {root_of(target).name for node in graph.nodes for target in written(node)}
    return [leaf for name, leaf in zip(names, leaves, strict=True) if name in roots and isinstance(leaf, Tensor)]


# ------------------------------------------------------------------------------------------------------- torch.compile


def is_lifted(module: fx.GraphModule) -> bool:
    """Whether a graph is one that torch.compile made: the weights of its model are among its inputs."""
    return any(n.op == "placeholder" and any(part in str(n.target) for part in _WEIGHT) for n in module.graph.nodes)


def bind_weights(module: fx.GraphModule, example: Sequence[Any]) -> tuple[fx.GraphModule, dict[str, Any]]:
    """A graph as torch.compile hands it to a backend, with what it lifted put back: (module, inputs that are left).

    Parameters, and whatever else the model owns by its name, become attributes; numbers that came as tensors become
    numbers; sizes that came as integers are read off the tensors that have them. Integers that the graph returns larger
    by one count the tokens so far: they become the input `past_length`.

    Raises:
        UnsupportedGraphError: an integer is none of these, or two count differently.
    """
    graph, root = fx.Graph(), nn.Module()
    left: dict[str, Any] = {}
    copied: dict[fx.Node, Any] = {}
    given = dict(zip([n for n in module.graph.nodes if n.op == "placeholder"], example, strict=True))
    counters = [node for node, value in given.items() if not isinstance(value, Tensor) and _counts(node)]
    if counters:
        left[PAST_LENGTH] = _agreed(counters)
        copied = dict.fromkeys(counters, graph.placeholder(PAST_LENGTH))
    for node, value in given.items():
        if isinstance(value, Tensor) and not _is_weight(node, value):
            copied[node] = graph.node_copy(node)
            left[str(node.target)] = value
    for node, value in given.items():
        if node not in copied:
            copied[node] = _bound(graph, root, node, value, copied)
    for node in module.graph.nodes:
        if node.op == "output":
            results = [n for n in node.all_input_nodes if isinstance(n.meta.get("example_value"), Tensor)]
            graph.output(tuple(copied[n] for n in results))
        elif node.target == "item" and isinstance(number := copied.get(node.args[0]), float):
            copied[node] = number
        elif node.op != "placeholder":
            copied[node] = graph.node_copy(node, copied.__getitem__)
            if node.op in ("get_attr", "call_module"):
                setattr(root, str(node.target), getattr(module, str(node.target)))
    bound = fx.GraphModule(root, graph)
    bound.meta[_LEAST] = max((_least(node) for node in counters), default=0)
    return bound, left


def _is_weight(node: fx.Node, value: Tensor) -> bool:
    return isinstance(value, nn.Parameter) or any(part in str(node.target) for part in _WEIGHT)


def _counts(node: fx.Node) -> bool:
    """Whether an integer comes out of the graph larger by one."""
    before = _symbol(node)
    outputs = node.graph.output_node().all_input_nodes
    return before is not None and any(_symbol(n) == before + 1 for n in outputs)


def _symbol(node: fx.Node) -> Any:
    """The expression of a dynamic integer, None for anything else."""
    value = node.meta.get("example_value")
    return value.node.expr if isinstance(value, torch.SymInt) else None


def _least(counter: fx.Node) -> int:
    symbol = counter.meta["example_value"].node
    lower = symbol.shape_env.bound_sympy(symbol.expr).lower
    return max(0, int(lower)) if lower.is_Integer else 0  # else unbounded


def _agreed(counters: Sequence[fx.Node]) -> int:
    """The number of tokens that counters stood at when the graph was captured."""
    counts = {node: int(node.meta["example_value"].node.hint) for node in counters}
    if len(set(counts.values())) > 1:
        stood = ", ".join(f"'{node.target}' at {count}" for node, count in counts.items())
        raise UnsupportedGraphError(f"the numbers that count tokens differ: {stood}", node=counters[0].name)
    return counts[counters[0]]


def _bound(graph: fx.Graph, root: nn.Module, node: fx.Node, value: Any, copied: Mapping[fx.Node, Any]) -> Any:
    """What stands for an input that is none of the decoder's."""
    if isinstance(value, Tensor):
        if value.dim() == 0 and value.dtype == torch.float64:
            return float(value)  # a Python number of the model
        name = str(node.target).replace(".", "_")
        root.register_parameter(name, value) if isinstance(value, nn.Parameter) else root.register_buffer(name, value)
        return graph.get_attr(name)
    symbol = str(node.meta.get("example_value"))
    for source, copy in copied.items():
        for dim, size in enumerate(getattr(source.meta.get("example_value"), "shape", ())):
            if is_symbolic(size) and str(size) == symbol:
                return graph.call_method("size", (copy, dim))
    if not node.users:
        return value
    raise UnsupportedGraphError(
        f"the graph takes the number '{node.target}', and nothing says how it goes on from step to step",
        node=node.name,
        hint="compile a step whose position is a tensor, such as cache_position",
    )
