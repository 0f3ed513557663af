"""Capture of a decode step that carries its own cache: what its inputs mean, and what it hands on to the next step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from lethe_compile.capture.graph import ROLES, Captured, functional
from lethe_compile.capture.original import OriginalStep
from lethe_compile.errors import UnsupportedGraphError
from lethe_compile.passes.complete_step import complete_step
from lethe_compile.passes.normalize import tidy
from lethe_compile.passes.program import (
    Program,
    State,
    Step,
    attribute,
    is_call,
    is_symbolic,
    operand,
    remove_dead,
    source_of,
    written,
)
from lethe_compile.passes.step import moved, past_dim, sizes_of

STEP_POSITIONS = ("cache_position", "cache_positions", "start_pos", "past_length")
POSITIONS = (*ROLES["position_ids"], *STEP_POSITIONS)
_NAMES = f"{', '.join(ROLES['input_ids'])} (token ids), {', '.join(POSITIONS)} (positions), attention_mask"


def is_step(exported: torch.export.ExportedProgram) -> bool:
    """Whether a program keeps state, or takes what only a decode step does: a past, or positions for all rows."""
    graph = exported.graph_module.graph
    inputs = {n for n in graph.nodes if n.op == "placeholder"}
    writes = [n for n in graph.nodes if not is_call(n, torch.ops.aten.detach_)]  # which writes no value
    if any(root_of(target) in inputs for node in writes for target in written(node)):
        return True
    given = set(exported.graph_signature.user_inputs)
    values = [n.meta.get("val") for n in inputs if n.name in given and n.users]
    return any(isinstance(value, Tensor) and value.dim() != 2 for value in values)


def root_of(node: fx.Node) -> fx.Node:
    """The tensor that `node` is a view of, and that writes to it reach."""
    while node.op == "call_function":
        schema = getattr(node.target, "_schema", None)
        if schema is None or not schema.arguments or schema.arguments[0].alias_info is None:
            break
        node = operand(node)
    return node


def capture_step(
    exported: torch.export.ExportedProgram,
    call: Callable[..., Any] | None = None,
    owner: Any = None,
    least: int = 0,
) -> Captured:
    """Capture a decode step; `call` runs the original, whose buffers are `owner`'s: by default the program itself.

    A step that holds after `least` tokens or more is completed by `complete_step`, and what results is the original.

    Raises:
        UnsupportedGraphError: an input has no role, something that is written is no cache, or nothing returned is
            logits.
    """
    module = functional(_without_aliases(exported), state=True)
    module.graph.set_codegen(fx.graph.CodeGen())
    module = fx.GraphModule(module, module.graph)  # without the hooks that check the old signature
    tidy(module)
    inputs = [n for n in module.graph.nodes if n.op == "placeholder"]
    states = _written(module)
    leaves = tree_leaves(module.graph.output_node().args[0])
    outputs = [leaf if isinstance(leaf, fx.Node) else None for leaf in leaves]
    states += _pasts(inputs, outputs, {state.node for state in states})
    roles = _roles([n for n in inputs if n not in {state.node for state in states}])
    logits = _logits(outputs, {state.after for state in states})
    program = _program(module, roles, states, logits, least)
    if least and complete_step(program):
        return Captured(program, _original_of(program))
    if call is None:
        own = exported.module(check_guards=False)
        call = owner = fx.GraphModule(own, own.graph)  # no hooks: a past may be empty, which they may not know
    original = OriginalStep(call, owner, exported.example_inputs, inputs, roles, states, outputs, logits)
    return Captured(program, original)


def _original_of(program: Program) -> OriginalStep:
    """The step as its own graph, which takes and returns all of its state."""
    assert program.step is not None
    inputs = program.placeholders()
    outputs: Any = program.graph.output_node().args[0]
    example: Any = ([0] * len(inputs), {})
    roles, states = program.step.roles, program.step.states
    return OriginalStep(program.module, None, example, inputs, roles, states, outputs, outputs[0])


def _without_aliases(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program with each tensor under one name: transformers' own exports name a cache as buffer and as constant."""
    module = exported.module(check_guards=False)
    names: dict[tuple[Any, ...], str] = {}
    merged = False
    for node in module.graph.nodes:
        value = attribute(module, str(node.target)) if node.op == "get_attr" else None
        if isinstance(value, Tensor) and value.numel():
            key = (value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
            name = names.setdefault(key, str(node.target))
            merged |= name != node.target
            node.target = name
    if not merged:
        return exported
    dynamic = []
    for node in (n for n in module.graph.nodes if n.op == "placeholder"):
        sizes = enumerate(sizes_of(node))
        dynamic.append({dim: torch.export.Dim.AUTO for dim, size in sizes if is_symbolic(size)} or None)
    module.graph.set_codegen(fx.graph.CodeGen())
    leaves = tuple(tree_leaves(exported.example_inputs))
    shapes = tuple(dynamic)
    return torch.export.export(fx.GraphModule(module, module.graph), leaves, dynamic_shapes=shapes, strict=False)


# --------------------------------------------------------------------------------------------------------------- state


def _written(module: fx.GraphModule) -> list[State]:
    """The inputs and buffers that the graph writes, all at its end; a written buffer becomes an input."""
    graph = module.graph
    states: dict[str, State] = {}
    for write in [n for n in graph.nodes if is_call(n, torch.ops.aten.copy_)]:
        target, after = write.args[:2]
        write.replace_all_uses_with(after)
        graph.erase_node(write)
        name = str(target.target)
        states[name] = _state(name, _as_input(module, target) if target.op == "get_attr" else target, after)
    return list(states.values())


def _as_input(module: fx.GraphModule, buffer: fx.Node) -> fx.Node:
    graph = module.graph
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    with graph.inserting_after(last):
        node = graph.placeholder(str(buffer.target).replace(".", "_"))
    node.meta["val"] = buffer.meta.get("val", attribute(module, str(buffer.target)))
    for same in [n for n in graph.nodes if n.op == "get_attr" and n.target == buffer.target]:
        same.replace_all_uses_with(node)
        graph.erase_node(same)
    return node


def _state(name: str, node: fx.Node, after: fx.Node) -> State:
    value = node.meta["val"]
    counts = value.numel() == 1 and not value.is_floating_point()
    if not counts and (value.dim() != 4 or past_dim(node) is not None):
        sizes = ", ".join(map(str, sizes_of(node)))
        raise UnsupportedGraphError(
            f"the graph writes '{name}' [{sizes}], which is no cache of keys or values [batch, heads, tokens, size] of "
            "a fixed size: the model keeps state of another kind",
            node=after.name,
            where=source_of(after) or None,
        )
    return State(name, node, after, counts)


def _pasts(inputs: Sequence[fx.Node], outputs: Sequence[fx.Node | None], known: Collection[fx.Node]) -> list[State]:
    """Caches that come in as inputs, and go out with new tokens as outputs."""
    found = []
    for node in inputs:
        name, value = str(node.target), node.meta.get("val")
        if node in known or not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() != 4:
            continue
        copies = moved(node)
        afters = list(dict.fromkeys(out for out in outputs if out is not None and out in copies))
        if len(afters) != 1:
            many = "none of its outputs is" if not afters else f"{len(afters)} of its outputs are"
            reason = f"the input '{name}' looks like a cache, and {many} that with new tokens"
            hint = "return the joined keys and values, one output for each past input"
            raise UnsupportedGraphError(reason, node=node.name, hint=hint)
        if past_dim(node) is None and sizes_of(afters[0]) != sizes_of(node):
            reason = f"the input '{name}' is a past of {list(sizes_of(node))} that cannot grow"
            hint = "export it with its number of tokens dynamic; where torch fixes that, optimize the model itself"
            raise UnsupportedGraphError(reason, node=node.name, hint=hint)
        found.append(State(name, node, afters[0]))
    return found


# --------------------------------------------------------------------------------------------------- inputs and logits


def _roles(inputs: Sequence[fx.Node]) -> dict[fx.Node, str]:
    roles = {node: role for node in inputs if (role := _role_by_name(node)) is not None}
    for node in inputs:
        if node in roles or not node.users:
            continue
        value = node.meta.get("val")
        plain = isinstance(value, Tensor) and value.dtype == torch.int64 and value.dim() == 2
        if plain and "input_ids" not in roles.values():
            roles[node] = "input_ids"
            continue
        sizes = f" {list(sizes_of(node))}" if isinstance(value, Tensor) else ""
        raise UnsupportedGraphError(
            f"the input '{node.target}'{sizes} has no known role in a decode step",
            node=node.name,
            where=source_of(next(iter(node.users))) or None,
            hint=f"call it one of {_NAMES}; a cache is a float tensor of 4 dimensions, returned with the new tokens",
        )
    ids = next((node for node, role in roles.items() if role == "input_ids"), None)
    if ids is None:
        raise UnsupportedGraphError(f"no input is the token ids: their name must be one of {ROLES['input_ids']}")
    tokens = sizes_of(ids)[1]
    if not is_symbolic(tokens) and tokens != 1:
        reason = f"the step takes {tokens} tokens at a time, neither one nor any number"
        raise UnsupportedGraphError(reason, node=ids.name, hint="export it for one token, or with tokens dynamic")
    return roles


def _role_by_name(node: fx.Node) -> str | None:
    name, value = str(node.target), node.meta.get("val")
    if not isinstance(value, Tensor):
        return "position" if name in POSITIONS and isinstance(value, torch.SymInt) else None
    if name in ROLES["attention_mask"]:
        return "attention_mask" if value.dim() == 2 else None
    if value.is_floating_point() or value.dtype == torch.bool:
        return None
    if name in ROLES["input_ids"]:
        return "input_ids" if value.dim() == 2 else None
    return "position" if name in POSITIONS and value.dim() <= 2 else None


def _logits(outputs: Sequence[fx.Node | None], afters: Collection[fx.Node]) -> fx.Node:
    """The first floating-point output of rank 3, or else of rank 2, that is no state."""
    tensors = [n for n in outputs if n is not None and n not in afters and isinstance(n.meta["val"], Tensor)]
    results = [n for n in tensors if n.meta["val"].is_floating_point()]
    for rank in (3, 2):
        for node in results:
            if node.meta["val"].dim() == rank:
                return node
    shapes = "; ".join(str(list(sizes_of(n))) for n in results)
    raise UnsupportedGraphError(f"the step returns no logits [batch, tokens, vocabulary], but {shapes or 'nothing'}")


def _program(
    module: fx.GraphModule, roles: Mapping[fx.Node, str], states: Sequence[State], logits: fx.Node, least: int
) -> Program:
    graph = module.graph
    ids = next(n for n, role in roles.items() if role == "input_ids")
    ids.target = ids.name = "input_ids"
    graph.output_node().args = ((logits, *(state.after for state in states)),)
    kept = {*roles, *(state.node for state in states)}
    for node in [n for n in graph.nodes if n.op == "placeholder" and n not in kept]:
        graph.erase_node(node)
    remove_dead(graph)
    return Program(fx.GraphModule(module, graph), step=Step(roles, tuple(states), least))
