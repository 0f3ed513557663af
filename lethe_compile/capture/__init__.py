"""Capture: from a model of any kind to one FX graph ``(input_ids, …) -> logits`` with batch and tokens dynamic."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from lethe_compile.capture.graph import (
    EXAMPLE_TOKENS,
    ROLES,
    Captured,
    evaluating,
    example_ids,
    export,
    logits_of,
    named_by_role,
    roles_of,
    to_program,
)
from lethe_compile.capture.peft import capture_peft, peft_base
from lethe_compile.capture.quantized import exportable, is_finite, plain_tensors
from lethe_compile.capture.step import capture_step, is_step
from lethe_compile.capture.step_module import bind_weights, capture_step_module, is_lifted
from lethe_compile.capture.transformers import capture_transformers
from lethe_compile.errors import InputError
from lethe_compile.passes.absent import is_absent

__all__ = ["Captured", "capture", "check_weights"]


def capture(
    model: nn.Module | torch.export.ExportedProgram,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
) -> Captured:
    """Capture a decoder as a graph.

    Args:
        model: a Hugging Face model, wrapped by PEFT or not, a plain module (an `fx.GraphModule` too), or an
            ExportedProgram whose batch and token dimensions are dynamic.
        example_inputs: arguments for a plain module, positional or by name, where its signature is not
            ``(input_ids[, positions])``: ``[batch, tokens]`` each. An input of an unknown name is told by its example:
            token ids come first, positions count 0 … T-1 in every row, a mask of padding is all ones.

    Raises:
        UnsupportedGraphError: the model cannot be exported, or its graph is no decoder's.
        InputError: NaN or infinite weights, several devices, or unusable example inputs.
    """
    if isinstance(model, torch.export.ExportedProgram):
        return _capture_program(model)
    if not isinstance(model, nn.Module):
        raise InputError(f"a model to optimize must be a module or an ExportedProgram, not {type(model).__name__}")
    check_weights(model)
    base = peft_base(model)
    with evaluating(model), exportable(model):
        if base is not None and _is_transformers(base):
            return capture_peft(model, base)
        if _is_transformers(model):
            return capture_transformers(model)
        return _capture_module(model if base is None else base, example_inputs)


def _is_transformers(model: nn.Module) -> bool:
    """Whether it is a `PreTrainedModel`, told without importing transformers."""
    return any(c.__module__ == "transformers.modeling_utils" for c in type(model).__mro__)


def check_weights(model: nn.Module) -> None:
    """Refuse weights that cannot work: on no device, on several, NaN or infinite.

    Raises:
        InputError: names the parameter.
    """
    devices: dict[str, str] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        devices.setdefault(str(tensor.device), name)
    if len(devices) > 1:
        places = ", ".join(f"{name} on {device}" for device, name in devices.items())
        raise InputError(f"the model lies on several devices ({places}): move it to one with model.to(device)")
    if "meta" in devices:
        raise InputError(f"the model has no weights: {devices['meta']} is on the meta device")
    for parameter_name, parameter in model.named_parameters():
        if is_absent(parameter):
            continue  # who fetches its parts looks at them
        for name, tensor in plain_tensors(parameter_name, parameter):
            if tensor.is_floating_point() and not is_finite(tensor):
                raise InputError(f"the weights are broken: {name} holds NaN or infinity")


def _capture_program(exported: torch.export.ExportedProgram) -> Captured:
    if is_step(exported):
        return capture_step(exported)
    module = exported.module(check_guards=False)
    names = [str(n.target) for n in module.graph.nodes if n.op == "placeholder"]
    leaves, structure = tree_flatten(exported.example_inputs)
    example = dict(zip(names, leaves, strict=True))
    roles = roles_of(example)

    def original(inputs: Mapping[str, Tensor]) -> Tensor:
        given = {**example, **named_by_role(roles, inputs)}
        args, kwargs = tree_unflatten(given.values(), structure)
        return logits_of(module(*args, **kwargs))

    return Captured(to_program(exported, roles), original)


def _capture_module(model: nn.Module, example_inputs: Sequence[Any] | Mapping[str, Any] | None) -> Captured:
    if isinstance(model, fx.GraphModule) and isinstance(example_inputs, Sequence) and is_lifted(model):
        model, example_inputs = bind_weights(model, example_inputs)
    step = capture_step_module(model, _parameters(model), _by_name(model, example_inputs))
    if step is not None:
        return step
    example = _example(model, example_inputs)
    roles = roles_of(example)
    program = to_program(export(model, example), roles)

    def original(inputs: Mapping[str, Tensor]) -> Tensor:
        with evaluating(model):
            return logits_of(model(**named_by_role(roles, inputs)))

    return Captured(program, original)


def _parameters(model: nn.Module) -> list[str]:
    """The names of the arguments of a module."""
    if isinstance(model, fx.GraphModule):
        return [str(n.target) for n in model.graph.nodes if n.op == "placeholder"]
    parameters = inspect.signature(model.forward).parameters.values()
    return [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def _by_name(model: nn.Module, given: Sequence[Any] | Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Example arguments by name. Of a graph, whose inputs are flat, what lists and caches among them hold."""
    names = _parameters(model)
    if isinstance(given, Mapping) and (set(given) <= set(names) or not isinstance(model, fx.GraphModule)):
        return dict(given)
    if given is None:
        return None
    values = tree_leaves(_in_order(model, given)) if isinstance(model, fx.GraphModule) else list(given)
    if len(values) > len(names):
        raise InputError(f"{len(values)} example inputs for a model that takes {len(names)}: {', '.join(names)}")
    return dict(zip(names, values, strict=False))


def _in_order(module: fx.GraphModule, given: Sequence[Any] | Mapping[str, Any]) -> Sequence[Any]:
    """Arguments in the order in which the graph was made to take them, as torch.export writes it down."""
    signature = getattr(module.graph._codegen, "pytree_info", None)
    if not isinstance(given, Mapping):
        return given
    order = [] if signature is None else [name for name in signature.orig_args if name in given]
    if len(order) < len(given):
        unknown = ", ".join(sorted({*given} - {*order}))
        raise InputError(f"the graph has no inputs {unknown} to take example inputs for")
    return [given[name] for name in order]


def _example(model: nn.Module, given: Sequence[Any] | Mapping[str, Any] | None) -> dict[str, Any]:
    """Example arguments by parameter name: those given, or made up for parameters whose names are known."""
    known = _by_name(model, given)
    if known is not None:
        return known
    names = _parameters(model)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    ids = example_ids(device)
    example = dict.fromkeys(names[:1], ids)
    for name in names[1:]:
        if name in ROLES["position_ids"]:
            example[name] = torch.arange(EXAMPLE_TOKENS, device=device).expand_as(ids).contiguous()
        elif name in ROLES["attention_mask"]:
            example[name] = torch.ones_like(ids)
    return example
