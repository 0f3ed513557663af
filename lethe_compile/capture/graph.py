"""From an exported program to the compiler's: inputs named by role, logits the only output, nothing written."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from lethe_compile.capture.functional import NotLocal, functionalize
from lethe_compile.errors import InputError, UnsupportedGraphError
from lethe_compile.passes.program import Program, argument, is_call, is_symbolic, same_sizes, shape_of, written

ROLES = {  # what each input of a decoder is called
    "input_ids": ("input_ids", "ids", "tokens", "token_ids", "idx", "inputs", "x"),
    "position_ids": ("position_ids", "positions", "position", "pos", "input_pos"),
    "attention_mask": ("attention_mask", "padding_mask"),
}
EXAMPLE_ROWS, EXAMPLE_TOKENS = 2, 9
_FIX_SHAPES = "export with dynamic_shapes={0: Dim.DYNAMIC, 1: Dim.DYNAMIC} for every input"
_log = logging.getLogger(__name__)
_AUTOCAST = torch.ops.higher_order.wrap_with_autocast


@dataclass(frozen=True)
class Captured:
    """A captured decoder, and the model as it was, to verify against."""

    program: Program
    original: Callable[[Mapping[str, Tensor]], Tensor]
    """Logits ``[B, T, vocab]`` of the unchanged model from inputs by role: input_ids, position_ids, attention_mask."""
    restart_at: int | None = None
    """Tokens beyond which transformers' `generate` fills the model's cache anew, once; see `capture.rope`."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the time of a capture: dropout is no part of a decoder."""
    if getattr(type(model), "eval", None) is not getattr(model.eval, "__func__", None):
        yield  # a module of an ExportedProgram: its mode is fixed, and it refuses to be told
        return
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def example_ids(device: torch.device) -> Tensor:
    """Token ids to export with: int64 ``[2, 9]``, sizes that torch.export takes for dynamic."""
    return torch.ones(EXAMPLE_ROWS, EXAMPLE_TOKENS, dtype=torch.int64, device=device)


def roles_of(example: Mapping[str, Any]) -> dict[str, str]:
    """The role of each input, by its name or else by its example; inputs without one are left out.

    Raises:
        UnsupportedGraphError: an input can be none of a decoder's.
    """
    roles: dict[str, str] = {}
    for name in example:
        role = next((r for r, names in ROLES.items() if name in names), None)
        if role is not None and role not in roles.values():
            roles[name] = role
    for name, value in example.items():
        if name not in roles and isinstance(value, Tensor):
            roles[name] = _role_by_example(name, value, taken=set(roles.values()))
    return roles


def _role_by_example(name: str, value: Tensor, taken: set[str]) -> str:
    if "input_ids" not in taken:
        return "input_ids"
    if value.dim() == 2:
        counts = torch.arange(value.shape[1], device=value.device).expand_as(value)
        if "position_ids" not in taken and bool((value == counts).all()):
            return "position_ids"
        if "attention_mask" not in taken and bool((value == 1).all()):
            return "attention_mask"
    known = ", ".join(name for names in ROLES.values() for name in names)
    raise UnsupportedGraphError(
        f"the input '{name}' has no known role",
        hint=f"call it one of {known}, or give an example that counts 0 … T-1 (positions) or is all ones (a mask)",
    )


def named_by_role(roles: Mapping[str, str], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inputs by role as arguments by the model's own names."""
    return {name: inputs[role] for name, role in roles.items()}


def logits_of(output: Any) -> Tensor:
    """The first floating-point tensor of rank 3 in what a model returns, as `to_program` picks it from its graph."""
    leaves = tree_leaves(getattr(output, "logits", output))
    found = (leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() == 3)
    return next(found)


def export(model: nn.Module, example: Mapping[str, Any]) -> torch.export.ExportedProgram:
    """`torch.export` with batch and tokens dynamic; examples are ``[batch >= 2, tokens >= 2]``.

    Raises:
        InputError: an example of another shape.
        UnsupportedGraphError: torch cannot export the model.
    """
    for name, value in example.items():
        if not isinstance(value, Tensor) or value.dim() != 2 or min(value.shape) < 2:
            given = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise InputError(f"example input {name!r} must be a tensor [batch >= 2, tokens >= 2], not {given}")
    dynamic = torch.export.Dim.DYNAMIC
    shapes = {name: {0: dynamic, 1: dynamic} for name in example}
    try:
        return torch.export.export(model, (), dict(example), dynamic_shapes=shapes, strict=False)
    except UnsupportedGraphError:
        raise
    except Exception as error:  # torch.export raises many kinds; each means that there is no graph to work on
        raise UnsupportedGraphError(
            f"the model cannot be exported: {type(error).__name__}: {str(error).strip().splitlines()[0]}",
            where=_line_of(error),
            hint="pass example_inputs if its signature is not (input_ids[, positions])",
        ) from error


def _line_of(error: BaseException) -> str | None:
    """The model's own line that an error came through: the innermost that is neither torch's nor ours."""
    ours = tuple(str(Path(module.__file__ or "").resolve().parent) for module in (torch, sys.modules["lethe_compile"]))
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not str(Path(frame.filename).resolve()).startswith(ours)]
    return f'File "{own[-1].filename}", line {own[-1].lineno}, in {own[-1].name}: {own[-1].line}' if own else None


def to_program(
    exported: torch.export.ExportedProgram, roles: Mapping[str, str], expected_layers: int | None = None
) -> Program:
    """Reduce an ExportedProgram to a flat graph: inputs named by role, logits the only output, nothing written.

    Raises:
        UnsupportedGraphError: an input is no decoder's or of fixed size, no output is logits, or the model keeps state.
    """
    module = functional(exported)
    graph = module.graph
    graph.set_codegen(fx.graph.CodeGen())
    for node in [n for n in graph.nodes if n.op == "placeholder"]:
        if str(node.target) in roles:
            _name_input(node, roles[str(node.target)])
        elif node.users:
            raise UnsupportedGraphError(f"the input '{node.target}' is no [batch, tokens] tensor", node=node.name)
        else:
            graph.erase_node(node)
    if "input_ids" not in roles.values():
        raise UnsupportedGraphError(f"no input is the token ids: their name must be one of {ROLES['input_ids']}")
    _keep_logits(graph)
    _refuse_state(graph)
    return Program(fx.GraphModule(module, graph), expected_layers)  # without the hooks that check the old signature


def functional(exported: torch.export.ExportedProgram, *, state: bool = False) -> fx.GraphModule:
    """Without writes to intermediate tensors, and with autocast written out; with `state`, others all at the end."""
    graphs = [m.graph for m in exported.graph_module.modules() if isinstance(m, fx.GraphModule)]
    calls = [n for g in graphs for n in g.nodes]
    if any(is_call(n, _AUTOCAST) and argument(n, 2, "enabled") for n in calls):
        return _module(exported.run_decompositions({}))
    module = _module(exported)
    try:
        for part in [m for m in module.modules() if isinstance(m, fx.GraphModule)]:
            functionalize(part.graph, state=state and part is module)
    except NotLocal as reason:
        _log.info("decomposing, which takes long: %s", reason)
        return _module(exported.run_decompositions({}))
    return module


def _module(exported: torch.export.ExportedProgram) -> fx.GraphModule:
    module: fx.GraphModule = exported.module(check_guards=False)
    return module


def _name_input(node: fx.Node, role: str) -> None:
    shape = shape_of(node)
    if len(shape) != 2 or not all(is_symbolic(size) for size in shape):
        sizes = ", ".join(map(str, shape))
        reason = f"the input '{node.target}' has the fixed shape [{sizes}]; batch and tokens must be dynamic"
        raise UnsupportedGraphError(reason, node=node.name, hint=_FIX_SHAPES)
    node.target = node.name = role


def _keep_logits(graph: fx.Graph) -> None:
    """Reduce the output to the first floating-point tensor of rank 3, one row for each token."""
    output = graph.output_node()
    results: list[fx.Node] = []
    fx.node.map_arg(output.args[0], results.append)
    logits = next((n for n in results if len(shape_of(n)) == 3 and n.meta["val"].is_floating_point()), None)
    ids = next(n for n in graph.nodes if n.target == "input_ids")
    if logits is None or not same_sizes(shape_of(logits)[:2], shape_of(ids)):
        shapes = "; ".join(f"[{', '.join(map(str, shape_of(n)))}]" for n in results)
        raise UnsupportedGraphError(
            f"the graph returns no logits [batch, tokens, vocabulary], but {shapes}",
            hint="return the logits of every token",
        )
    output.args = (logits,)


def _refuse_state(graph: fx.Graph) -> None:
    for node in graph.nodes:
        for target in written(node):
            if target.op in ("placeholder", "get_attr"):
                kind = "input" if target.op == "placeholder" else "buffer"
                raise UnsupportedGraphError(
                    f"the graph writes the {kind} '{target.target}': the model keeps state of its own",
                    node=node.name,
                    hint="give it without a cache of its own, such as with use_cache=False",
                )
